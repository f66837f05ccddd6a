"""Reads tar shards: their indexes, the files beside them, a cache of those that lie in stores, and maps over many."""
