"""Says how often images come: weights, where they come from, and mixes of data sets."""
