"""Draws curves, tables and reconstructions from the folders of runs."""
