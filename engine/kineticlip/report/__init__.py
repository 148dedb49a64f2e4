"""One HTML page from evaluation results."""
