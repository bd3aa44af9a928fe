"""Batches of tokenised texts, metrics, vocabularies, and the overlap of splits."""
