"""From entries to scores to results: the recogniser, protocols, features and embeddings."""
