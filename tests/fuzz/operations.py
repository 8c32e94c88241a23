"""Every public operation as generated calls; those of attention are built here, the others in `flows`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import cvg_kernels as cvg
from cvg_kernels.ops import first_highest_keys
from tests.fuzz import flows
from tests.fuzz.call import Call, Operation
from tests.fuzz.cases import Case, Range
from tests.fuzz.tensors import Maker

_ALL = ("float32", "bfloat16", "float16", "float64")
_REDUCTIONS = ("mean", "none")
_SCALES = (None, 1.0, 0.0, -0.7, 30.0)
_MASKS = ("none", "bool", "additive", "one_for_all", "rows", "dense_bool", "dense_additive")


def _ids(make: Maker, kind: str, batch: int, keys: int, tokens: int) -> Any:
    """Token ids in every form that is accepted."""
    ids = make.integers(0, keys, tokens)
    if kind == "repeated":
        ids[:] = ids[0]
    if kind == "edges":
        ids = torch.tensor([0, keys - 1])[make.integers(0, 2, tokens)]
    if kind == "per_sample":
        return make.integers(0, keys, batch, tokens)
    if kind == "int32":
        return ids.int()
    if kind == "strided":
        return ids.repeat_interleave(2)[::2]
    return ids if kind == "tensor" else ids.tolist()


def _mask(make: Maker, kind: str, full: tuple[int, int, int, int]) -> torch.Tensor | None:
    """A mask in every form that is accepted."""
    batch, heads, queries, keys = full
    if kind == "none":
        return None
    if kind == "bool":
        return make.flags(batch, keys)
    if kind == "rows":  # a sample that sees no key
        seen = make.flags(batch, keys).clone()
        seen[:1] = False
        return seen
    if kind == "additive":
        mask = make.ordinary(batch, 1, 1, keys).clone()
        return mask.masked_fill_(make.flags(batch, 1, 1, keys, share=0.2), -torch.inf)
    if kind == "one_for_all":
        return make.ordinary(1, 1, 1, keys, dtype=torch.float32) - 1e4
    if kind == "dense_bool":
        return make.flags(batch, 1, queries, keys)
    return make.ordinary(1, heads, queries, keys)


def _frames(make: Maker, kind: str, length: int) -> Any:
    frames = make.integers(-1, 6, length)
    if kind == "edges":
        frames = torch.tensor([-1, 0, 2**24 - 1])[make.integers(0, 3, length)]
    if kind == "none":
        frames = torch.full((length,), -1)
    return frames.tolist() if kind == "list" else frames


def _operands(make: Maker, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    batch, heads = sizes["batch"], sizes["heads"]
    return {
        "query": make.tensor(batch, heads, sizes["queries"], sizes["dim"]),
        "key": make.tensor(batch, heads, sizes["keys"], sizes["dim"]),
    }


def _depth(*sizes: int) -> int:
    return max(32, *sizes)


def _attention(case: Case, make: Maker, values: bool) -> Call:
    sizes, options = case.sizes, case.options
    batch, heads, queries, keys = (sizes[n] for n in ("batch", "heads", "queries", "keys"))
    arguments: dict[str, Any] = _operands(make, sizes)
    if values:
        arguments["value"] = make.tensor(batch, heads, keys, sizes["value_dim"])
    captures = not values or options["capture"]
    ids = _ids(make, options["ids"], batch, keys, sizes["tokens"]) if captures else None
    arguments |= {"token_ids": ids, "scale": options["scale"], "head_reduction": options["reduction"]}
    leaves = [*_leaves(arguments)]
    extra, refusal = options["extra"], None
    if extra == "band":
        frames = [_frames(make, options["frames"], n) for n in (queries, keys)]
        arguments["band"] = cvg.FrameBand(*frames, sigma=1.5, strength=options["strength"])
    else:
        arguments["key_mask"] = _mask(make, options["mask"], (batch, heads, queries, keys))
        if options["mask"].startswith("dense"):
            refusal = "depends on the query or the head"
    if extra.startswith("bias") and captures:
        tokens = sizes["tokens"]
        shape = {"bias": (tokens,), "bias_samples": (batch, tokens)}
        bias = make.ordinary(*shape.get(extra, (batch, tokens, queries)), dtype=torch.float32)
        arguments["token_bias"] = bias
        leaves.append("token_bias")
    function = cvg.attention_with_capture if values else cvg.capture_maps
    depth = _depth(batch * queries, keys, sizes["dim"], heads * queries)
    return Call(function, arguments, tuple(leaves), depth, refusal)


def _leaves(arguments: dict[str, Any]) -> list[str]:
    return [name for name in ("query", "key", "value") if name in arguments]


def _frame_band(case: Case, make: Maker) -> Call:
    sizes, options = case.sizes, case.options
    arguments: dict[str, Any] = _operands(make, sizes)
    shape = (sizes["batch"], sizes["heads"], sizes["keys"], sizes["value_dim"])
    arguments["value"] = make.tensor(*shape)
    leaves = tuple(_leaves(arguments))
    for name, length in (("query_frames", sizes["queries"]), ("key_frames", sizes["keys"])):
        arguments[name] = _frames(make, options["frames"], length)
    arguments |= {name: options[name] for name in ("sigma", "strength", "scale", "row_max_grad")}
    depth = _depth(sizes["queries"], sizes["keys"], sizes["dim"])
    return Call(cvg.frame_band_attention, arguments, leaves, depth)


class Reached(NamedTuple):
    """The logits that `first_highest_keys` found."""

    highest: torch.Tensor


def _reached(query, key, scale, backend):
    """The logit at the key that is found, whichever of two that tie but for a rounding it is."""
    place = first_highest_keys(query, key, scale=scale, backend=backend)
    if torch.is_autocast_enabled("cpu") and query.dtype != torch.float64:  # as it does
        query, key = query.bfloat16(), key.bfloat16()
    wide = torch.promote_types(query.dtype, torch.float32)
    if place.device.type == "meta" or type(place) is not torch.Tensor:
        return Reached(torch.empty_like(place, dtype=wide))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    scores = scale * (query.detach().double() @ key.detach().double().mT)
    reached = scores.gather(-1, place[..., None]).squeeze(-1)
    # No key is the highest one of a row with a NaN.
    return Reached(reached.masked_fill(scores.isnan().any(-1), torch.nan).to(wide))


def _highest(case: Case, make: Maker) -> Call:
    operands = _operands(make, case.sizes)
    return Call(_reached, operands | {"scale": case.options["scale"]}, (), case.sizes["dim"])


def _temporal(case: Case, make: Maker) -> Call:
    sizes, options = case.sizes, case.options
    shape = (sizes["positions"], sizes["heads"], sizes["frames"])
    if options["two_axes"]:
        shape = (2, *shape)
    arguments: dict[str, Any] = {
        "query": make.tensor(*shape, sizes["dim"]),
        "key": make.tensor(*shape, sizes["dim"]),
        "value": make.tensor(*shape, sizes["value_dim"]),
    }
    leaves = _leaves(arguments)
    frames, extra = sizes["frames"], options["extra"]
    if extra == "bias":
        arguments["bias"] = make.ordinary(frames, frames, dtype=torch.float32)
        leaves.append("bias")
    elif extra == "hidden":
        bias = make.ordinary(frames, frames, dtype=torch.float32).clone()
        arguments["bias"] = bias.masked_fill_(make.flags(frames, frames, share=0.3), -torch.inf)
    elif extra == "band":
        arguments |= {"sigma": options["sigma"], "strength": options["strength"]}
    elif extra == "band_of_tensors":
        arguments |= {"sigma": torch.tensor(options["sigma"]), "strength": torch.tensor(0.7)}
        leaves += ["sigma", "strength"]
    names = ("scale", "row_max_grad", "capture")
    arguments |= {name: options[name] for name in names}
    depth = _depth(sizes["frames"] * sizes["positions"] * sizes["heads"], sizes["dim"])
    return Call(cvg.temporal_attention, arguments, tuple(leaves), depth)


def _temporal_maps(case: Case, make: Maker) -> Call:
    sizes, options = case.sizes, case.options
    batch, heads = sizes["batch"], sizes["heads"]
    grid = (sizes["frames"], sizes["rows"], sizes["columns"])
    video, before, behind = grid[0] * grid[1] * grid[2], sizes["before"], sizes["behind"]
    starts = {"query_start": before, "key_start": behind}
    lengths = {"queries": video + before + 1, "keys": video + behind}
    arguments: dict[str, Any] = _operands(make, sizes | lengths)
    arguments["lse"] = None
    leaves = ["query", "key"]
    if options["lse"]:
        arguments["lse"] = _lse(make, arguments, options["scale"])
        leaves.append("lse")
    full = (batch, heads, lengths["queries"], lengths["keys"])
    arguments["key_mask"] = _mask(make, options["mask"], full)
    arguments |= {"grid": grid, **starts, "scale": options["scale"], "head_reduction": options["reduction"]}
    refusal = "depends on the query or the head" if options["mask"].startswith("dense") else None
    depth = _depth(sizes["dim"], grid[0], heads)
    return Call(cvg.temporal_maps, arguments, tuple(leaves), depth, refusal)


def _lse(make: Maker, operands: dict[str, torch.Tensor], scale: float | None) -> torch.Tensor:
    """Numbers that could be the log-sum-exp of these logits: above each of them."""
    query, key = (operands[name].double() for name in ("query", "key"))
    logits = (query.shape[-1] ** -0.5 if scale is None else scale) * (query @ key.mT)
    return (logits.amax(-1) + make.normal(*logits.shape[:-1]).abs()).float()


_ATTENTION_SIZES = {
    "batch": Range(0, 3, 5),
    "heads": Range(1, 4, 11),
    "queries": Range(0, 9, 257),
    "keys": Range(1, 9, 257),
    "dim": Range(1, 20, 256),
    "value_dim": Range(1, 20, 256),
    "tokens": Range(1, 5, 79),
}
_ATTENTION_OPTIONS = {
    "ids": ("list", "tensor", "int32", "per_sample", "repeated", "edges", "strided"),
    "mask": _MASKS,
    "extra": ("none", "bias", "bias_samples", "bias_queries", "band"),
    "frames": ("list", "tensor", "edges", "none"),
    "strength": (1.0, -0.5, 0.0),
    "reduction": _REDUCTIONS,
    "scale": _SCALES,
}
_MAPS_SIZES = {name: r for name, r in _ATTENTION_SIZES.items() if name != "value_dim"}
_BAND_SIZES = {name: r for name, r in _ATTENTION_SIZES.items() if name != "tokens"}

#: Name → operation: all that `cvg_kernels.ops` makes public.
OPERATIONS: dict[str, Operation] = {
    "attention_with_capture": Operation(
        lambda case, make: _attention(case, make, True),
        _ATTENTION_SIZES,
        _ATTENTION_OPTIONS | {"capture": (True, False)},
        _ALL,
        casts=True,
        backends=("native", "triton", "reference", "stock"),
    ),
    "capture_maps": Operation(
        lambda case, make: _attention(case, make, False), _MAPS_SIZES, _ATTENTION_OPTIONS, _ALL, casts=True
    ),
    "frame_band_attention": Operation(
        _frame_band,
        _BAND_SIZES,
        {
            "frames": ("list", "tensor", "edges", "none"),
            "sigma": (1.5, 1e-3, 40.0),
            "strength": (1.0, -0.5, 0.0, 8.0),
            "scale": _SCALES,
            "row_max_grad": (True, False),
        },
        _ALL,
        casts=True,
    ),
    "first_highest_keys": Operation(
        _highest,
        {name: _ATTENTION_SIZES[name] for name in ("batch", "heads", "queries", "keys", "dim")},
        {"scale": (1.0, 0.3, -0.7)},
        _ALL,
        casts=True,
    ),
    "temporal_attention": Operation(
        _temporal,
        {
            "positions": Range(0, 7, 67),
            "heads": Range(1, 4, 11),
            "frames": Range(1, 17, 131),
            "dim": Range(1, 20, 256),
            "value_dim": Range(1, 20, 256),
        },
        {
            "extra": ("none", "bias", "hidden", "band", "band_of_tensors"),
            "sigma": (2.0, 0.3, 30.0),
            "strength": (1.0, -0.5, 0.0),
            "scale": _SCALES,
            "row_max_grad": (True, False),
            "capture": (True, False),
            "two_axes": (False, True),
        },
        _ALL,
        casts=True,
    ),
    "temporal_maps": Operation(
        _temporal_maps,
        {
            "batch": Range(0, 3, 5),
            "heads": Range(1, 4, 11),
            "frames": Range(1, 9, 67),
            "rows": Range(1, 3, 11),
            "columns": Range(1, 3, 13),
            "dim": Range(1, 20, 256),
            "before": Range(0, 3, 3),
            "behind": Range(0, 3, 3),
        },
        {"lse": (False, True), "mask": _MASKS, "reduction": _REDUCTIONS, "scale": _SCALES},
        _ALL,
        casts=True,
    ),
    **flows.OPERATIONS,
}
