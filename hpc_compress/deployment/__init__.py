"""Lower precisions, zeros and smaller vocabularies for the model that will run."""
