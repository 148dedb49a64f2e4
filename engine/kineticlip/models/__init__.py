"""CLIP towers and parts: shapes, weights, text, classifiers, packed and 8-bit forms, costs."""
