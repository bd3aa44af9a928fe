"""Pruning: criteria, where to cut how much, and the cut with its repair."""
