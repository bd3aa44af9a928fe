"""Lower precisions, zeros and smaller word embeddings for the model that will run."""
