"""Input files to requests."""
