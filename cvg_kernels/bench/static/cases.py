"""Which variants are compiled for which GPU: a set that covers, small enough for every run of the tests, and the
whole.

The whole is every layer on every target and every head_dim with every number of tokens on every target: over a
thousand kernels. The covering set has every head_dim on every target; every number of tokens on every
target, and with every head_dim somewhere; every kernel of every layer on Hopper; those without a grid also elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

from cvg_kernels.bench.static.compiled import TARGETS
from cvg_kernels.bench.variants import VARIANTS, AttentionVariant, Variant

Job = tuple[Variant, str, tuple[str, ...] | None]

DIMS = (40, 64, 72, 80, 88, 96, 128, 160, 256)
TOKENS = (8, 16, 33, 77)
#: Where every head_dim is compiled backward too; elsewhere every second one.
_BACKWARD = ("sm_80", "sm_90")
#: Layers of which every part is compiled, of the others forward and the gradients of everything.
_EVERY_PART = ("VideoCrafter2 cross", "CogVideoX-2B joint")
#: Layers whose kernels are those of another layer, but for sizes.
_WHOLE_ONLY = tuple(
    variant
    for variant in VARIANTS
    if variant.name == "Wan 480p flow" or (variant.dtype == "float32" and "Wan" in variant.name)
)


def grid_variant(dim: int, tokens: int) -> AttentionVariant:
    """A layer with few keys, many of them captured.

    Args:
        dim: size of a head.
        tokens: captured.
    """
    return AttentionVariant(f"D {dim}, {tokens} tokens", "bfloat16", 2, 8, 2560, 77, dim, tokens)


def covering() -> Iterator[Job]:
    """The set that the tests compile."""
    for t, target in enumerate(TARGETS):
        for d, dim in enumerate(DIMS):
            parts = ("forward", "query") if target in _BACKWARD or (d + t) % 2 else ("forward",)
            yield grid_variant(dim, TOKENS[(d + t) % len(TOKENS)]), target, parts
    others = [target for target in TARGETS if target != "sm_90"]
    for number, variant in enumerate(v for v in VARIANTS if v not in _WHOLE_ONLY):
        if isinstance(variant, AttentionVariant):
            every = variant.name in _EVERY_PART and variant.dtype != "float32"
            yield variant, "sm_90", None if every else ("forward", "all")
        else:
            yield variant, "sm_90", None
            yield variant, others[number % len(others)], None


def whole() -> Iterator[Job]:
    """Every variant on every target."""
    for target in TARGETS:
        for variant in VARIANTS:
            yield variant, target, None
        for dim in DIMS:
            for tokens in TOKENS:
                yield grid_variant(dim, tokens), target, ("forward", "query", "all")
