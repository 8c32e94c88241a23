"""The operations on maps, graphs and predictions as generated calls."""

from __future__ import annotations

from typing import Any

import torch

import cvg_kernels as cvg
from tests.fuzz.call import Call, Operation
from tests.fuzz.cases import Case, Range
from tests.fuzz.tensors import Maker

_WIDE = ("float32", "float64")
_ALL = ("float32", "bfloat16", "float16", "float64")
_RESIDUALS = ("average", "add", None)
_TEMPERATURES = (None, 0.5, 0.01, 1e-3)


def _hops(make: Maker, count: int, *shape: int) -> list[torch.Tensor]:
    return [make.capacities(*shape) for _ in range(count)]


def _graph(case: Case, make: Maker) -> tuple[dict[str, Any], list[str]]:
    """Cross maps and temporal hops, and their names."""
    names = ("batch", "tokens", "frames", "places", "hops")
    batch, tokens, frames, places, hops = (case.sizes[name] for name in names)
    arguments = {
        "cross": make.capacities(batch, tokens, frames, places),
        "temporal": _hops(make, hops, batch, places, frames, frames),
    }
    return arguments, ["cross", *(f"temporal[{number}]" for number in range(hops))]


def _path_flow(case: Case, make: Maker) -> Call:
    arguments, leaves = _graph(case, make)
    sizes, options = case.sizes, case.options
    if options["spatial"]:
        batch, frames, places = (sizes[name] for name in ("batch", "frames", "places"))
        arguments["spatial"] = make.capacities(batch, frames, places, places)
        leaves.append("spatial")
    names = ("temperature", "residual", "correct_bias", "order")
    arguments |= {name: options[name] for name in names}
    return Call(cvg.path_flow, arguments, tuple(leaves), max(sizes.values()))


def _min_max_matmul(case: Case, make: Maker) -> Call:
    sizes, options = case.sizes, case.options
    arguments: dict[str, Any] = {
        "a": make.tensor(sizes["batch"], sizes["rows"], sizes["inner"]),
        "b": make.tensor(sizes["batch"], sizes["inner"], sizes["columns"]),
    }
    arguments |= {name: options[name] for name in ("temperature", "correct_bias")}
    return Call(cvg.min_max_matmul, arguments, ("a", "b"), max(sizes.values()))


def _token_peaks(case: Case, make: Maker) -> Call:
    sizes = case.sizes
    names = ("batch", "tokens", "frames", "rows", "columns")
    flow = make.capacities(*(sizes[name] for name in names))
    arguments = {"flow": flow, **{name: case.options[name] for name in ("sharpness", "sigma")}}
    return Call(cvg.token_peaks, arguments, ("flow",), 27 + sizes["tokens"])


def _max_flow(case: Case, make: Maker) -> Call:
    sizes = case.sizes
    nodes = sizes["nodes"]
    source, sink = make.random.sample(range(nodes), 2)
    capacity = make.capacities(sizes["graphs"], nodes, nodes)
    arguments = {"capacity": capacity, "source": source, "sink": sink}
    return Call(cvg.max_flow, arguments, ("capacity",), nodes)


def _subgraph(case: Case, make: Maker) -> Call:
    arguments, leaves = _graph(case, make)
    arguments |= {name: case.options[name] for name in ("residual", "sink")}
    return Call(cvg.subgraph_max_flow, arguments, tuple(leaves), max(case.sizes.values()))


def _coupled(case: Case, make: Maker) -> Call:
    arguments, leaves = _graph(case, make)
    sizes = case.sizes
    if case.options["spatial"]:
        batch, frames, places = (sizes[name] for name in ("batch", "frames", "places"))
        arguments["spatial"] = make.capacities(batch, frames, places, places)
        leaves.append("spatial")
    arguments["residual"] = case.options["residual"]
    return Call(cvg.coupled_max_flow, arguments, tuple(leaves), max(sizes.values()))


def _mix(case: Case, make: Maker) -> Call:
    sizes, options = case.sizes, case.options
    rank, count = options["rank"], sizes["predictions"]
    shape = (sizes["batch"], sizes["channels"], sizes["frames"], sizes["pixels"])[:rank]
    predictions = [make.tensor(*shape) for _ in range(count)]
    scales: list[Any] = [(1.0, 7.5, 0.0, -2.0)[int(make.integers(0, 4))] for _ in range(count - 1)]
    refusal = None
    leaves = tuple(f"predictions[{number}]" for number in range(count))
    if options["scales"] == "tensors":
        scales = [make.ordinary(sizes["batch"], dtype=torch.float32) for _ in scales]
        leaves += tuple(f"scales[{number}]" for number in range(count - 1))
        refusal = "differentiated by backend 'reference' only"
    elif options["scales"] == "one_tensor":
        scales[0] = torch.ones(sizes["batch"])
    if options["rescale"]:
        refusal = "differentiated by backend 'reference' only"
    arguments = {"predictions": predictions, "scales": scales, "rescale": options["rescale"]}
    return Call(cvg.guidance_mix, arguments, leaves, 32, refusal)


def _structure(case: Case, make: Maker) -> Call:
    sizes = case.sizes
    depth = make.tensor(*(sizes[name] for name in ("batch", "frames", "rows", "columns")))
    rounds = make.random.randrange(9)
    t_s = make.integers(0, 8, sizes["batch"]) if case.options["per_sample"] else rounds
    # Torch makes the weights of a resize from coordinates in float32, which are as large as a side.
    side = max(sizes["rows"], sizes["columns"], 8)
    return Call(cvg.depth_structure, {"depth": depth, "t_s": t_s}, ("depth",), side**2)


_GRAPH_SIZES = {
    "batch": Range(0, 2, 3),
    "tokens": Range(0, 4, 41),
    "frames": Range(1, 7, 31),
    "places": Range(0, 5, 37),
    "hops": Range(0, 3, 3),
}
#: The solver of the reference is plain Python.
_SMALL_GRAPHS = {
    "batch": Range(0, 2, 2),
    "tokens": Range(0, 2, 3),
    "frames": Range(1, 4, 11),
    "places": Range(0, 3, 11),
    "hops": Range(0, 2, 3),
}

OPERATIONS: dict[str, Operation] = {
    "path_flow": Operation(
        _path_flow,
        _GRAPH_SIZES,
        {
            "temperature": _TEMPERATURES,
            "residual": _RESIDUALS,
            "correct_bias": (False, True),
            "order": ("tokens_first", "hops_first"),
            "spatial": (False, True),
        },
        _WIDE,
    ),
    "min_max_matmul": Operation(
        _min_max_matmul,
        {"batch": Range(0, 3, 5), "rows": Range(0, 9, 131), "inner": Range(1, 9, 131), "columns": Range(0, 9, 131)},
        {"temperature": _TEMPERATURES, "correct_bias": (False, True)},
        _WIDE,
    ),
    "token_peaks": Operation(
        _token_peaks,
        {
            "batch": Range(0, 3, 5),
            "tokens": Range(1, 5, 41),
            "frames": Range(1, 5, 17),
            "rows": Range(1, 7, 37),
            "columns": Range(1, 7, 67),
        },
        {"sharpness": (100.0, 1.0, 1e4, 0.0), "sigma": (0.5, 0.05, 3.0)},
        _WIDE,
    ),
    "max_flow": Operation(
        _max_flow, {"graphs": Range(0, 3, 5), "nodes": Range(2, 9, 67)}, {}, _WIDE, ("native", "reference")
    ),
    "subgraph_max_flow": Operation(
        _subgraph, _SMALL_GRAPHS, {"residual": _RESIDUALS, "sink": ("video", "frame")}, _WIDE, ("native", "reference")
    ),
    "coupled_max_flow": Operation(
        _coupled, _SMALL_GRAPHS, {"residual": _RESIDUALS, "spatial": (False, True)}, _WIDE, ("native", "reference")
    ),
    "guidance_mix": Operation(
        _mix,
        {
            "batch": Range(0, 3, 5),
            "channels": Range(0, 5, 31),
            "frames": Range(1, 5, 17),
            "pixels": Range(1, 9, 257),
            "predictions": Range(2, 4, 4),
        },
        {"scales": ("numbers", "tensors", "one_tensor"), "rescale": (0.0, 0.7, 1.0), "rank": (4, 1, 2, 3)},
        _ALL,
    ),
    "depth_structure": Operation(
        _structure,
        {"batch": Range(0, 3, 5), "frames": Range(0, 3, 11), "rows": Range(1, 9, 131), "columns": Range(1, 9, 131)},
        {"per_sample": (False, True)},
        _ALL,
        ("reference",),
    ),
}
