"""Telling whether a denoiser is the one that a classifier was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cvg_kernels.pipeline.models import MODELS, unwrap

#: Relative. Rounding to bfloat16 changes a norm by far less than the first; to 8 bits (layer-wise casting) by 2e-3 in
#: the shapes model.
_TOLERANCE, _TOLERANCE_8_BITS = 2e-3, 1e-2


def fingerprint(denoiser: nn.Module, layers: Sequence[str]) -> dict[str, Any]:
    """The class of a denoiser, and the norms of the query and key weights of chosen layers.

    Norms rather than a digest: they survive a change of dtype or device.

    Args:
        denoiser: the network.
        layers: names of attention layers.
    """
    network = unwrap(denoiser)
    modules = dict(network.named_modules())
    return {
        "class": _class_name(network),
        "norms": {
            name: [
                float(f"{float(projection.weight.detach().float().norm()):.6g}")
                for projection in _projections(modules[name])
            ]
            for name in layers
            if name in modules
        },
    }


def _projections(module: Any) -> tuple[Any, Any]:
    """Those of queries and keys; Kandinsky's layers have other names for them."""
    if hasattr(module, "to_query"):
        return module.to_query, module.to_key
    return module.to_q, module.to_k


def _class_name(network: nn.Module) -> str:
    """The class of a denoiser that is known, which a subclass (`fully_shard` makes one) may derive from."""
    names = [base.__name__ for base in type(network).__mro__]
    return next((name for name in names if name in MODELS), names[0])


def difference(trained: dict[str, Any], denoiser: nn.Module) -> str | None:
    """Says in what a denoiser differs from the one of a fingerprint; `None` if it is that one.

    Args:
        trained: the fingerprint.
        denoiser: the network.
    """
    here = fingerprint(denoiser, list(trained["norms"]))
    if trained["class"] != here["class"]:
        return f"it was trained on {trained['class']}, the pipeline has {here['class']}"
    coarse = any(p.dtype.itemsize == 1 for p in unwrap(denoiser).parameters())
    tolerance = _TOLERANCE_8_BITS if coarse else _TOLERANCE
    for name, norms in trained["norms"].items():
        if name not in here["norms"]:
            return f"the pipeline has no layer {name!r}"
        other = here["norms"][name]
        if any(abs(a - b) > tolerance * abs(a) for a, b in zip(norms, other, strict=True)):
            return f"the weights of {name!r} are others"
    return None
