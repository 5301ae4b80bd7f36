"""What to worry about, class by class: which findings stand out, and the images that show them."""
