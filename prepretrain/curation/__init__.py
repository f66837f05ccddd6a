"""Curates a split's shards: measures each image and text, finds copies, and decides what is kept."""
