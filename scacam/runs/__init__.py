"""A run on disk: its record, its life, its lock, its proof, and reading it back."""
