"""Moves boxes, masks and maps of a picture together with it."""
