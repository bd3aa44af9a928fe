"""Families of encoders, surgery on them, and their artifacts."""
