"""Holds the image encoders, text towers, heads and decoders, and reads and writes their weights."""
