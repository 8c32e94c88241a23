"""How large the tiles of the attention kernels are, and how programs share the heads, by shape and kind of GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

#: Keys up to which traffic counts, so that a kernel of one head captures the head's share of the maps.
SHORT_KEYS = 1024
#: Keys that a program holds at once, without a loop over them.
FEW_KEYS = 128


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a score tile, and how many warps and pipeline stages work on it.

    `rest` columns, if any, are a second, narrower tile of keys: 77 keys are 64 + 16 columns instead of 128. If not
    `peeled`, every tile of keys is masked, not only the last one: the code is half as long and takes fewer registers.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    rest: int = 0
    peeled: bool = True


@lru_cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether a GPU has the warp-group products and the shared memory (227 KB) of sm_90."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def forward_tile(
    head_dim: int, element_size: int, *, hopper: bool = False, band: bool = False, capture: bool = False
) -> Tile:  # fmt: skip
    """The tile of the forward kernel where keys pass by in a loop: as large as registers allow without spilling.

    Args:
        head_dim: the larger one of query and value.
        element_size: bytes.
        hopper: whether the GPU is of Hopper's kind.
        band: whether a band is added to every tile of scores.
        capture: whether the kernel captures maps as well.
    """
    if element_size == 4:  # float32 is multiplied without tensor cores
        rows, columns = (32, 32) if head_dim <= 64 else (16, 16 if band else 32)
        return Tile(rows, columns, 8, 1, peeled=False)
    if head_dim > 128:
        return Tile(64, 32 if hopper and not band else 16, 4, 1, peeled=False)
    if hopper:
        if not band and (head_dim <= 64 or (head_dim == 128 and not capture)):
            return Tile(128, 128, 8, 2)
        return Tile(128, 64, 8, 2)
    if band:
        return Tile(128, 64 if head_dim <= 64 else 32, 8, 2, peeled=False)
    return Tile(128, 64, 8 if head_dim > 64 else 4, 2, peeled=False)


def few_keys_tile(keys: int, head_dim: int, element_size: int, *, hopper: bool = False) -> Tile | None:
    """The tile that holds all `keys` at once; `None` where they are too many for registers."""
    if element_size == 4 or not 0 < keys <= FEW_KEYS or head_dim > (128 if hopper else 64):
        return None
    columns = next(size for size in (16, 32, 64, 128) if keys <= size)
    rest = 0
    if 64 < keys <= 96:
        columns, rest = 64, 16 if keys <= 80 else 32
    return Tile(64, columns, 4, 2, rest)


def capture_inside(tokens: int, keys: int, head_dim: int) -> bool:
    """Whether a kernel of one head writes its share of the head mean, to be added up.

    That moves 8 bytes for each token and row, there and back. A capture kernel reads the queries again, 2·D bytes of a
    row; where keys are many that is nothing beside attention itself, and it needs no room for shares.
    """
    return keys <= SHORT_KEYS and 4 * tokens <= head_dim


def heads_of_a_program(programs: int, heads: int, processors: int) -> int:
    """How many heads a program takes in turn: as many as leave four programs for each processor, if there are so many.

    Args:
        programs: tiles of all samples, of one head.
        heads: heads of a sample.
        processors: multiprocessors of the GPU.
    """
    groups = min(heads, -(-4 * processors // max(1, programs)))
    return max(1, -(-heads // max(1, groups)))
