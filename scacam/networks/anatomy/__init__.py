"""Inside a network: its layers, its head, and the gradients between them, by watching it run."""
