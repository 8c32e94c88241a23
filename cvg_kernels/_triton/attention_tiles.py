"""How large a score tile is, and how many warps and pipeline stages work on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a score tile, and how many warps and pipeline stages work on it."""

    rows: int
    columns: int
    warps: int
    stages: int


def forward_tile(head_dim: int, element_size: int) -> Tile:
    """The tile of the forward kernel: as large as registers allow without spilling."""
    if element_size == 4:  # float32 is multiplied without tensor cores
        return Tile(16, 32, 8, 1) if head_dim > 64 else Tile(32, 32, 8, 1)
    if head_dim > 128:
        return Tile(64, 32, 4, 1)
    return Tile(128, 64, 8, 2) if head_dim > 64 else Tile(128, 64, 4, 3)


def backward_tile(head_dim: int, element_size: int) -> Tile:
    """The tile of the backward kernels, which hold more at once."""
    if element_size == 4:
        return Tile(32, 16, 8, 1) if head_dim > 64 else Tile(32, 32, 4, 1)
    if head_dim > 128:
        return Tile(32, 32, 8, 1)
    return Tile(64, 64, 8, 1) if head_dim > 64 else Tile(64, 64, 4, 2)
