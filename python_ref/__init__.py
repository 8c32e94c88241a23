"""The definition of every operation, in plain PyTorch: one file an operation, nothing but torch imported."""
