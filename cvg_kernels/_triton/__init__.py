"""Triton kernels and their launchers, one file an operation. Imported only when a kernel is about to run."""
