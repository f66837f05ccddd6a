"""Reads videos: files and lists, the frames that make a clip, the views that a test takes."""
