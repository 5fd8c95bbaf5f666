"""One file for each reader; each has its targets in ``TARGETS``."""
