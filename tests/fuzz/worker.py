"""Makes calls of a seed one after the other in a process that may die: what it does next always stands in a file.

    python -m tests.fuzz.worker <seed> <backend> <first> <calls> <seconds> <folder>

`<folder>/at` has the number of the call that is being made, and `<folder>/found.jsonl` a line for each failure and, at
the end, one for the figures. A call that takes longer than `LIMIT` seconds ends the process with every thread's stack.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import warnings
from pathlib import Path

#: Seconds for one call: a thousand times what a large one takes, on a machine that has nothing else to do.
LIMIT = 300
_INTERPRETED = 20  # times as long, where Triton's interpreter makes it


def main(seed: int, backend: str, first: int, calls: int, seconds: float, folder: Path) -> None:
    """Makes the calls, or as many of them as there are seconds for."""
    prepare()
    from tests.fuzz.cases import draw
    from tests.fuzz.numbers import Numbers
    from tests.fuzz.operations import OPERATIONS
    from tests.fuzz.oracle import Failure, examine

    numbers, started, made = Numbers(), time.monotonic(), 0
    with (folder / "at").open("w") as at, (folder / "found.jsonl").open("a") as found:

        def say(kind: str, **what: object) -> None:
            found.write(json.dumps({"kind": kind, **what}) + "\n")
            found.flush()

        for number in range(first, first + calls):
            if time.monotonic() - started > seconds:
                break
            at.seek(0)
            at.write(f"{number:12d}")
            at.flush()
            faulthandler.dump_traceback_later(LIMIT * (_INTERPRETED if backend == "triton" else 1), exit=True)
            case = draw(seed, number, backend, OPERATIONS)
            try:
                numbers.note(case, number, examine(case))
            except Failure as failure:
                say("failure", number=number, says=str(failure))
            made += 1
        faulthandler.cancel_dump_traceback_later()
        say("end", made=made, numbers=numbers.lines())


def prepare() -> None:
    """What a process that makes calls needs: Triton's interpreter where there is no GPU, and quiet."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # `auto` is the shipped table, whatever this machine's user has tuned.
    os.environ["CVG_AUTO_DIR"] = os.path.join(os.path.dirname(__file__), "no-such-folder")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        from tests.interpreter import round_as_gpus_do

        round_as_gpus_do()
    _remember_cuts()
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    warnings.simplefilter("ignore")
    faulthandler.enable()


def _remember_cuts() -> None:
    """Lets the solver of the reference, plain Python, solve a graph once though it is asked in several precisions."""
    from cvg_kernels.reference import coupled_max_flow, max_flow

    find, known = max_flow.source_side, {}

    def source_side(capacity: list[list[float]], source: int, sink: int) -> list[bool]:
        graph = (source, sink, tuple(map(tuple, capacity)))
        if graph not in known:
            if len(known) > 1000:
                known.clear()
            known[graph] = find(capacity, source, sink)
        return known[graph]

    max_flow.source_side = coupled_max_flow.source_side = source_side


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]), given[1], int(given[2]), int(given[3]), float(given[4]), Path(given[5]))
