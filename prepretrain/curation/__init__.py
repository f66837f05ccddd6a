"""Curates web data: what is in it, what is twice in it, and what is kept."""
