"""Reads tar shards: their indexes, a cache of those that lie in stores, and maps over many."""
