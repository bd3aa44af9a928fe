"""Scores units, decides how much to cut where, cuts, and repairs what is left."""
