"""What the jobs do with a block of images, one module per stage."""
