"""Real films on disk: finding, naming, reading and caching them."""
