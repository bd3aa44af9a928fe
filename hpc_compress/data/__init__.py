"""Datasets, batches and metrics."""
