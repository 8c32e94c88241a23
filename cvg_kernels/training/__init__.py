"""How the composition classifier is trained: clips, their features on disk, and the training loop."""
