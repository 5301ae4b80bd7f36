"""What to worry about: where maps lie, how alike they are, how two runs differ."""
