"""From lists and labels to batches: sampling, views, augmentation, loaders."""
