"""Neural networks whose attribute names are the keys of their checkpoints."""
