"""Pages about a run, each one HTML file."""
