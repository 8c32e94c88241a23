"""Measurements: timing against what people use today, and what compilers make of the kernels."""
