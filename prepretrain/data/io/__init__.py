"""Reads files here and in stores: which there are, what their names say, and what their values mean."""
