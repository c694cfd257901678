"""Notebooks of this repository are compared by the project's own rules whenever pytest runs with --nbval."""

pytest_plugins = ["genailab_helpers.nbregression"]
