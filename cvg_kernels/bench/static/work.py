"""What the loops of each kernel compute by the formula, from the constants of a launch."""

from __future__ import annotations

import re
from collections.abc import Callable

from cvg_kernels.bench.static.mix import Mix
from cvg_kernels.bench.static.model import Work

#: Constants that say nothing of which kernel it is: sizes, or true in the interpreter only.
_SILENT = ("UPCAST",)

Products = dict[str, int]


def _forward(c: dict) -> list[tuple[int, int, int, int]]:
    """(elements, true depth, padded depth) of a loop, depth summed over its products."""
    value = (c["VALUE_DIM"], c["VALUE_PAD"]) if c["HAS_VALUE"] else (0, 0)
    return [(c["ROWS"] * c["COLUMNS"], c["DIM"] + value[0], c["DIM_PAD"] + value[1])]


def _capture(c: dict):
    return [(c["ROWS"] * c["TOKENS_PAD"], c["DIM"], c["DIM_PAD"])]


def _query(c: dict):
    value = (c["VALUE_DIM"], c["VALUE_PAD"]) if c["HAS_OUT"] else (0, 0)
    return [(c["ROWS"] * c["COLUMNS"], 2 * c["DIM"] + value[0], 2 * c["DIM_PAD"] + value[1])]


def _key(c: dict):
    keys, values = 1 + c["NEED_KEY"], c["HAS_OUT"] + c["NEED_VALUE"]
    return [
        (
            c["ROWS"] * c["COLUMNS"],
            keys * c["DIM"] + values * c["VALUE_DIM"],
            keys * c["DIM_PAD"] + values * c["VALUE_PAD"],
        )
    ]


_LOOPS: dict[str, Callable] = {
    "forward_kernel": _forward,
    "capture_kernel": _capture,
    "delta_kernel": _capture,
    "query_kernel": _query,
    "key_kernel": _key,
}


def label(launch) -> str:
    """The kernel's name and what is switched on in it, `query_kernel (has_maps, has_out)` for instance."""
    on = sorted(
        name.lower()
        for name, value in launch.constants.items()
        if value is True and name not in _SILENT
    )
    name = launch.kernel.fn.__name__
    return f"{name} ({', '.join(on)})" if on else name


def work_of(launch, mix: Mix) -> Work | None:
    """What a turn of a loop of this launch is for; `None` for kernels whose loops are not known here.

    Where a kernel has several loops with products, it is the one whose padded products are nearest to those executed.
    """
    loops = _LOOPS.get(launch.kernel.fn.__name__)
    if loops is None:
        return None
    works = [
        Work(elements, 2 * elements * depth, 2 * elements * padded)
        for elements, depth, padded in loops(launch.constants)
    ]
    executed = mix.tensor_flops * launch.num_warps
    return min(works, key=lambda work: abs(work.padded_flops - executed))


_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(?:nvidia|amd)_\w*m\w*<\{(?P<fields>.*)\}>$", re.MULTILINE)
_RESULT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot)\b.*-> tensor<(\d+)x(\d+)xf32, (#\w+)>", re.MULTILINE
)


def repeated_products(ttgir: str) -> float:
    """How often the warps compute an element of a matrix product, of the worst product in Triton's GPU code.

    Warps that are laid along the rows do `instruction rows · warps` of them at once; a tile with fewer rows is computed
    several times over. 1 is right.
    """
    spans = {}
    for match in _LAYOUT.finditer(ttgir):
        fields = {
            name: [int(number) for number in re.findall(r"\d+", values)]
            for name, values in re.findall(
                r"(warpsPerCTA|instrShape) = \[([\d, ]+)\]", match["fields"]
            )
        }
        warps, shape = fields["warpsPerCTA"][-2:], fields["instrShape"]
        spans[match[1]] = (warps[0] * shape[0], warps[1] * shape[1])
    worst = 1.0
    for rows, columns, layout in _RESULT.findall(ttgir):
        if layout in spans:
            span = spans[layout]
            worst = max(worst, max(1, span[0] / int(rows)) * max(1, span[1] / int(columns)))
    return worst
