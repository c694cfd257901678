"""X-rays drawn from known anatomy by the physics of projection, with their ground truth."""
