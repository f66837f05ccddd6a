"""Makes visual foundation models in two stages: masked autoencoding, then weak supervision."""
