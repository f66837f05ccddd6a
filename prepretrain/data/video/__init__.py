"""Reads videos: their files and lists, the frames that make a clip, and the views that a test takes."""
