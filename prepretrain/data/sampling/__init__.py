"""Says which images come, and how often: weights and where they come from, mixes and subsets of data sets."""
