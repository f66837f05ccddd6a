"""Counts what a source of objects, maps or videos holds, finds what cannot be used of it, and draws some."""
