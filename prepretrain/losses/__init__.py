"""Holds the losses that several objectives share."""
