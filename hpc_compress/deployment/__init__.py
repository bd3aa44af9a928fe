"""Deployment: precisions, zeros and vocabularies of the model that will run."""
