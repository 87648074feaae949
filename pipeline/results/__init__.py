"""Results, safely on disk."""
