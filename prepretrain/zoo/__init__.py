"""Lists the released checkpoints and fetches them."""
