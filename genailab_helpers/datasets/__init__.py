"""Real images on disk: indexing, reading, preparing and distrusting them."""
