"""The measures of the paper, each usable alone."""
