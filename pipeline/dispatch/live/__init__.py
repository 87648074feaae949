"""One call for each request."""
