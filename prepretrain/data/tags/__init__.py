"""Makes labels of hashtags and captions: their spelling, vocabularies, WordNet's synsets, and counts of them."""
