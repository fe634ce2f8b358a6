"""Principal subspaces of activations and gradients, and updates that leave them alone."""
