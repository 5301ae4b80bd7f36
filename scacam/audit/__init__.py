"""What to worry about: where maps lie and how alike they are, what stands out, how runs differ."""
