"""What dense tasks add to a model: attention within windows, pyramids of maps, detectors' parts."""
