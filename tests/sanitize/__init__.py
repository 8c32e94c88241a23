"""What `make sanitize` builds besides the kernels; the command is scripts/sanitize.py."""
