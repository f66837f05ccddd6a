"""Holds what is said of places in a picture, boxes, masks and maps, and moves it together with the picture."""
