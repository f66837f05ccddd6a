"""Makes labels of hashtags and captions: spelling, vocabularies, WordNet's synsets, counts."""
