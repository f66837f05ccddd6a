"""Counts what a source of objects, maps or videos holds, and finds what cannot be used."""
