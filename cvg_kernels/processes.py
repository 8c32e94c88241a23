"""Which of several processes this one is, and what they tell each other.

Launchers (`torchrun`, `accelerate launch`, SLURM's `srun`) start the same program several times and say in the
environment which one each is. Nothing here starts a process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cvg_kernels.errors import ArgumentError

#: Launchers by the variables they set: number, count, number on this machine.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    # SLURM_NTASKS would be there in a batch script too, which is one process
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
#: Processes wait for the slowest one, whose share may take hours; one that dies is noticed at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Place:
    """One process among several.

    Attributes:
        rank: its number.
        count: how many there are.
        local: its number on this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] | None = None) -> Place:
        """Reads what the launcher said; a process that nobody launched is alone.

        Args:
            environment: `None` takes that of this process.
        """
        given = os.environ if environment is None else environment
        for names in _LAUNCHERS:
            with suppress(KeyError, ValueError):
                rank, count, local = (int(given[name]) for name in names)
                if 0 <= rank < count:
                    return cls(rank, count, local)
        return cls()

    def device(self, name: str) -> str:
        """Returns the device of this process: `cuda` is the GPU of its number where a machine runs several.

        Args:
            name: as the user gave it; `cuda:1` is taken at its word.

        Raises:
            ArgumentError: if there are fewer GPUs than processes on this machine.
        """
        import torch

        if name != "cuda" or self.count == 1 or not torch.cuda.is_available():
            return name
        count = torch.cuda.device_count()
        if count == 1:  # SLURM's --gpus-per-task shows each task its own
            return "cuda:0"
        if self.local >= count:
            raise ArgumentError(
                f"--device cuda needs a GPU for each process, got {count} GPUs for process {self.local} of this "
                "machine"
            )
        return f"cuda:{self.local}"


def gather(mine: Any, place: Place) -> list[Any]:
    """Returns what each process has, in the order of their ranks, to all of them.

    Args:
        mine: what this process gives; anything that can be pickled.
        place: place of this process.

    Raises:
        ArgumentError: if nobody said where they meet.
        RuntimeError: if another process died meanwhile.
    """
    if place.count == 1:
        return [mine]
    import torch.distributed as dist

    if not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            raise ArgumentError(
                "several processes must be started by torchrun or accelerate launch, or be given MASTER_ADDR and "
                "MASTER_PORT"
            )
        dist.init_process_group("gloo", rank=place.rank, world_size=place.count, timeout=_PATIENCE)
    found: list[Any] = [None] * place.count
    dist.all_gather_object(found, mine, group=_on_cpu(dist))
    return found


def _on_cpu(dist: Any) -> Any:
    """A group that carries objects of the CPU, if the one there cannot."""
    return None if "gloo" in dist.get_backend() else dist.new_group(backend="gloo", timeout=_PATIENCE)
