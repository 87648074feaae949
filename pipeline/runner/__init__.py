"""One run from inputs to summary."""
