"""The stages of the explain job, and what else runs on Ray."""
