"""The jobs, one file each, every one reads as the way of the data."""
