"""How well heatmaps localize, measured against the truth."""
