"""What the loops of each kernel compute by the formula, from the constants of a launch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from cvg_kernels.bench.static.mix import Mix
from cvg_kernels.bench.static.model import Work

#: Constants that say nothing of which kernel it is: true in the interpreter only.
_SILENT = ("UPCAST",)


def _work(of: str, rows: int, columns: int, depths: tuple[int, int], real: int | None = None) -> Work:
    """Products of a tile of scores.

    Args:
        of: what the loop goes over.
        rows: rows of the tile.
        columns: columns of the tile.
        depths: summed over the products of a score, by the formula and as computed.
        real: columns that there really are, if fewer.
    """
    real = columns if real is None else min(real, columns)
    return Work(of, rows * real, 2 * rows * real * depths[0], 2 * rows * columns * depths[1])


def _depths(c: dict, keys: int, values: int = 0) -> tuple[int, int]:
    """Summed depth, true and padded, of so many products over the head_dim of keys and of values."""
    if not values:  # a kernel without values does not know their size
        return keys * c["DIM"], keys * c["DIM_PAD"]
    return (keys * c["DIM"] + values * c["VALUE_DIM"], keys * c["DIM_PAD"] + values * c["VALUE_PAD"])


def _tokens(c: dict, a: dict, depths: tuple[int, int]) -> Work:
    return _work("tokens", c["ROWS"], c["TOKENS_PAD"], depths, a["tokens"])


def _forward(c: dict, a: dict) -> Iterator[Work]:
    depths = _depths(c, 1, c["HAS_VALUE"])
    yield _work("keys", c["ROWS"], c["COLUMNS"], depths)
    if c["BAND"]:  # the row maxima
        yield _work("keys", c["ROWS"], c["COLUMNS"], _depths(c, 1))
    if c["HAS_TOKEN_BIAS"]:
        yield _tokens(c, a, depths)


def _few_keys(c: dict, a: dict) -> Iterator[Work]:
    depths = _depths(c, 1, c["HAS_VALUE"])
    work = _work("heads", c["ROWS"], c["COLUMNS"] + c["REST"], depths, a["keys"])
    if c["CAPTURE"]:
        more = _tokens(c, a, _depths(c, 1))
        flops, padded = work.flops + more.flops, work.padded_flops + more.padded_flops
        work = Work("heads", work.elements, flops, padded)
    yield work


def _capture(c: dict, a: dict) -> Iterator[Work]:
    yield Work("heads", *_tokens(c, a, _depths(c, 1))[1:])


def _row(c: dict, a: dict) -> Iterator[Work]:
    yield _work("keys", c["ROWS"], c["COLUMNS"], _depths(c, 1 + c["NEED_QUERY"], c["HAS_OUT"]))
    yield _tokens(c, a, _depths(c, 1 + (c["NEED_QUERY"] and not c["HAS_TOKEN_BIAS"])))
    if c["HAS_TOKEN_BIAS"]:
        yield _tokens(c, a, _depths(c, 2, c["HAS_OUT"]))


def _key(c: dict, a: dict) -> Iterator[Work]:
    values = c["NEED_VALUE"] + (c["NEED_KEY"] and c["HAS_OUT"])
    yield _work("queries", c["ROWS"], c["COLUMNS"], _depths(c, 1 + c["NEED_KEY"], values))


def _token_key(c: dict, a: dict) -> Iterator[Work]:
    values = c["HAS_TOKEN_BIAS"] * (c["HAS_OUT"] + c["NEED_VALUE"])
    work = _tokens(c, a, _depths(c, 1 + c["NEED_KEY"], values))
    yield Work("queries", *work[1:])


def _token_bias(c: dict, a: dict) -> Iterator[Work]:
    yield Work("heads", *_tokens(c, a, _depths(c, 1, c["HAS_OUT"]))[1:])


#: What a turn of the loops of each kernel is for, from its constants and arguments; its main loop first.
_LOOPS: dict[str, Callable[[dict, dict], Iterator[Work]]] = {
    "forward_kernel": _forward,
    "few_keys_kernel": _few_keys,
    "capture_kernel": _capture,
    "row_kernel": _row,
    "key_kernel": _key,
    "token_key_kernel": _token_key,
    "token_bias_kernel": _token_bias,
}


def label(launch) -> str:
    """The kernel's name and what is switched on in it, `query_kernel (has_maps, has_out)` for instance."""
    on = sorted(name.lower() for name, value in launch.constants.items() if value is True and name not in _SILENT)
    name = launch.kernel.fn.__name__
    return f"{name} ({', '.join(on)})" if on else name


def work_of(launch, mix: Mix) -> Work | None:
    """What a turn of a loop of this launch is for; `None` for kernels whose loops are not known here.

    Where a kernel has several loops with products, it is the one whose padded products are nearest to those executed.
    """
    loops = _LOOPS.get(launch.kernel.fn.__name__)
    if loops is None:
        return None
    works = list(loops(launch.constants, launch.arguments))
    if mix.unsized:
        return works[0]
    # without tensor cores a lane's FFMA is two operations
    executed = (mix.tensor_flops if mix.tensor else 64 * mix.fma) * launch.num_warps
    return min(works, key=lambda work: abs(work.padded_flops - executed))


_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(?:nvidia|amd)_\w*m\w*<\{(?P<fields>.*)\}>$", re.MULTILINE)
_RESULT = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot)\b.*-> tensor<(\d+)x(\d+)xf32, (#\w+)>", re.MULTILINE)


def repeated_products(ttgir: str) -> float:
    """How often the warps compute an element of a matrix product, of the worst product in Triton's GPU code.

    Warps that are laid along the rows do `instruction rows · warps` of them at once; a tile with fewer rows is
    computed several times over. 1 is right.
    """
    spans = {}
    for match in _LAYOUT.finditer(ttgir):
        fields = {
            name: [int(number) for number in re.findall(r"\d+", values)]
            for name, values in re.findall(r"(warpsPerCTA|instrShape) = \[([\d, ]+)\]", match["fields"])
        }
        warps, shape = fields["warpsPerCTA"][-2:], fields["instrShape"]
        spans[match[1]] = (warps[0] * shape[0], warps[1] * shape[1])
    worst = 1.0
    for rows, columns, layout in _RESULT.findall(ttgir):
        if layout in spans:
            span = spans[layout]
            worst = max(worst, max(1, span[0] / int(rows)) * max(1, span[1] / int(columns)))
    return worst
