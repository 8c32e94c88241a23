"""Telling whether a denoiser is the one that a classifier was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cvg_kernels.pipeline.models import unwrap

_TOLERANCE = 2e-3  # relative; rounding to bfloat16 changes a norm by far less


def fingerprint(denoiser: nn.Module, layers: Sequence[str]) -> dict[str, Any]:
    """The class of a denoiser, and the norms of the query and key weights of chosen layers.

    Norms rather than a digest: they survive a change of dtype or device.

    Args:
        denoiser: the network.
        layers: names of attention layers.
    """
    modules = dict(unwrap(denoiser).named_modules())
    return {
        "class": type(unwrap(denoiser)).__name__,
        "norms": {
            name: [
                float(f"{float(projection.weight.detach().float().norm()):.6g}")
                for projection in (modules[name].to_q, modules[name].to_k)
            ]
            for name in layers
            if name in modules
        },
    }


def difference(trained: dict[str, Any], there: dict[str, Any]) -> str | None:
    """Says in what two fingerprints differ; `None` if they are of one model."""
    if trained["class"] != there["class"]:
        return f"it was trained on {trained['class']}, the pipeline has {there['class']}"
    for name, norms in trained["norms"].items():
        if name not in there["norms"]:
            return f"the pipeline has no layer {name!r}"
        other = there["norms"][name]
        if any(abs(a - b) > _TOLERANCE * abs(a) for a, b in zip(norms, other, strict=True)):
            return f"the weights of {name!r} are others"
    return None
