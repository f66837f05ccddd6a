"""Reads files here and in stores: which there are, what their names and values mean."""
