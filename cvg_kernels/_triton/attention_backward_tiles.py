"""How large the tiles of the backward kernels of attention are, and into how many parts the queries go."""

from __future__ import annotations

from cvg_kernels._triton.attention_tiles import Tile


def backward_row_tile(head_dim: int, element_size: int, hopper: bool, band: bool = False) -> Tile:
    """The tile of the backward kernel that keeps a tile of queries.

    Every warp has rows, or 8 columns, of its own, so that no product is made twice. Triton gives the warps rows where
    a tile has at least as many of them as the padded head dimension, or warp groups multiply (Hopper), and columns
    elsewhere.

    Args:
        head_dim: the larger one of query and value.
        element_size: bytes.
        hopper: whether the GPU has the products and the shared memory of Hopper's kind.
        band: whether a band is added to every tile of scores, which takes registers.
    """
    if element_size == 4:
        return Tile(16, 16, 8, 1) if head_dim > 64 else Tile(32, 16, 8, 1)
    if head_dim > 128:
        return Tile(64, 16, 4, 2) if hopper else Tile(16, 64, 8, 2)
    if head_dim > 64:
        return Tile(128, 64 if hopper else 16 if band else 32, 8, 2)
    return Tile(64, 32 if band and not hopper else 64, 4, 2)


def backward_key_tile(head_dim: int, element_size: int, hopper: bool) -> Tile:
    """The tile of the backward kernel that keeps a tile of keys, which take the place of the rows.

    Args:
        head_dim: the larger one of query and value.
        element_size: bytes.
        hopper: whether the GPU has the products and the shared memory of Hopper's kind.
    """
    if element_size == 4:
        return Tile(16, 32, 8, 1)
    if head_dim > 128:
        return Tile(32, 64, 4, 2) if hopper else Tile(64, 16, 8, 2)
    if head_dim > 64:
        return Tile(32 if hopper else 16, 128, 8, 2)
    return Tile(64, 64, 4, 2)


def backward_token_tile(head_dim: int, element_size: int) -> Tile:
    """The tile of the backward kernels that keep a few chosen tokens."""
    if element_size == 4:
        return Tile(32, 16, 8 if head_dim > 64 else 4, 1)
    return Tile(64, 16, 4, 1 if head_dim > 128 else 2)


def parts_of_queries(programs: int, queries: int, rows: int, processors: int) -> tuple[int, int]:
    """Into how many parts the queries go over the grid where programs are few, and how many queries a part has.

    As many as give four programs to each processor, but of at least eight tiles each: a part costs memory and traffic.

    Args:
        programs: programs without parts.
        queries: rows of a sample.
        rows: rows of a tile.
        processors: multiprocessors of the GPU.
    """
    tiles = max(1, -(-queries // rows))
    parts = min(-(-4 * processors // max(1, programs)), -(-tiles // 8))
    tiles_each = -(-tiles // max(1, parts))
    return -(-tiles // tiles_each), tiles_each * rows
