"""One training loop, a generator of epoch records; single process and Ray Train drive it."""
