"""Reads samples: dataset cards, sources, transforms, and the order in which batches come."""
