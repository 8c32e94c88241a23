"""The table of kernels: per operation and backend the module, the devices, the dtypes and the limits.

Whatever chooses, names or prints a kernel reads it here: `auto`, a named backend's refusals, `cvg-kernels info` and
`tune`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Backend(str, Enum):
    """Implementations of an operation.

    Attributes:
        AUTO: the fastest one that can, by the table of `cvg_kernels.auto`.
        REFERENCE: plain PyTorch, the definition.
        STOCK: torch's own fused attention; the maps by our capture kernel.
        NATIVE: C++ on CPU tensors.
        TRITON: Triton on GPU tensors.
        TRITON_SPECIALISED: Triton with specialised warps, on Hopper.
        CUDA: CUDA C++ on NVIDIA GPU tensors.
    """

    AUTO = "auto"
    REFERENCE = "reference"
    STOCK = "stock"
    NATIVE = "native"
    TRITON = "triton"
    TRITON_SPECIALISED = "triton_specialised"
    CUDA = "cuda"


#: Those that Triton compiles; its interpreter runs them on CPU tensors.
TRITON_BACKENDS = (Backend.TRITON, Backend.TRITON_SPECIALISED)


class Facts(NamedTuple):
    """What is known of a call: all that a choice of its kernel may depend on. Hashable; absent sizes are 0."""

    device: torch.device
    dtype: torch.dtype
    batch: int = 0
    heads: int = 0
    queries: int = 0
    keys: int = 0
    head_dim: int = 0
    value_dim: int = 0  #: 0: no values, maps only
    tokens: int = 0  #: captured ones
    frames: int = 0  #: of maximum flow also the nodes
    hops: int = 0
    predictions: int = 0
    key_bias: bool = False
    token_bias: bool = False
    band: bool = False
    rescale: bool = False
    need_query: bool = False  #: of a backward pass: which gradients go out
    need_key: bool = False
    need_value: bool = False
    need_token_bias: bool = False
    grad_out: bool = False  #: of a backward pass: which gradients come in
    grad_maps: bool = False
    grad_lse: bool = False
    deterministic: bool = False  #: the same numbers in every run are asked for


@dataclass(frozen=True)
class Limit:
    """What a kernel does not take.

    Attributes:
        says: as `cvg-kernels info` prints it.
        refusal: a call's facts → what of it is refused, or `None`.
    """

    says: str
    refusal: Callable[[Facts], str | None]


@dataclass(frozen=True)
class Kernel:
    """A line of the table.

    Attributes:
        module: where its functions are; imported when it is first used.
        devices: types of device whose tensors it takes; none: every one.
        dtypes: those it computes in; none: every floating point type.
        limits: what it does not take.
        asks: whether the module itself knows if it can run: `reason(device, dtype) -> str | None`.
    """

    module: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    asks: bool = False

    def refusal(self, facts: Facts) -> tuple[str, str] | None:
        """What of a call this kernel does not take, and what it takes; or `None`."""
        if self.dtypes and str(facts.dtype).removeprefix("torch.") not in self.dtypes:
            return f"in dtype {facts.dtype}", ", ".join(self.dtypes)
        for limit in self.limits:
            refused = limit.refusal(facts)
            if refused is not None:
                return f"with {refused}", limit.says
        return None


# --- limits ----------------------------------------------------------------------------------------------------------


def _between(least: int, most: int, name: str, called: str | None = None) -> Limit:
    """A size lies between two numbers; `called` is its name in words."""
    called = called or name

    def refusal(facts: Facts) -> str | None:
        size = getattr(facts, name)
        return None if least <= size <= most else f"{called} {size}"

    return Limit(f"{called} {least} to {most}", refusal)


def _without(flag: str, what: str) -> Limit:
    """A thing that calls may have and this kernel cannot do."""
    return Limit(f"calls without {what}", lambda facts: what if getattr(facts, flag) else None)


def _frames_in_registers(facts: Facts) -> str | None:
    most = 32 if facts.dtype.itemsize == 4 else 128
    if 1 <= facts.frames <= most:
        return None
    return f"frames {facts.frames} in {facts.dtype}"


def _no_values(facts: Facts) -> str | None:
    return None if facts.value_dim else "no values"


def _unequal_dims(facts: Facts) -> str | None:
    if facts.value_dim in (0, facts.head_dim):
        return None
    return f"head_dim {facts.head_dim} and {facts.value_dim} of value"


def _odd_dims(facts: Facts) -> str | None:
    if facts.device.type != "cuda" or (facts.head_dim % 8 == 0 and facts.head_dim <= 256):
        return None
    return f"head_dim {facts.head_dim} on a GPU"


def _other_than(*dims: int) -> Callable[[Facts], str | None]:
    """Refuses every head_dim but these."""
    return lambda facts: None if facts.head_dim in dims else f"head_dim {facts.head_dim}"


def _not_hopper(facts: Facts) -> str | None:
    import torch

    if facts.device.type != "cuda" or not torch.cuda.is_available():
        return None  # the interpreter, or a GPU that is not here to be asked
    if torch.version.hip is not None:
        return "an AMD GPU"
    major, minor = torch.cuda.get_device_capability(facts.device)
    return None if (major, minor) == (9, 0) else f"a GPU of compute capability {major}.{minor}"


def _unordered_sums(facts: Facts) -> str | None:
    if facts.deterministic and facts.device.type == "cuda":
        return "a deterministic backward pass on a GPU"
    return None


_STOCK_LIMITS = (
    _without("key_bias", "a key mask"),
    _without("token_bias", "a bias on tokens"),
    _without("band", "a band"),
    Limit("calls with values", _no_values),
    Limit("values with as many channels as keys", _unequal_dims),
    Limit("on a GPU head_dim up to 256 that 8 divides", _odd_dims),
)
_SPECIALISED_LIMITS = (
    Limit("GPUs of compute capability 9.0", _not_hopper),
    Limit("head_dim 64 or 128", _other_than(64, 128)),
    Limit("calls with values", _no_values),
    Limit("values with as many channels as keys", _unequal_dims),
    Limit("at least one key", lambda facts: None if facts.keys else "no keys"),
    _without("key_bias", "a key mask"),
    _without("token_bias", "a bias on tokens"),
    _without("band", "a band"),
)
_STOCK_BACKWARD_LIMITS = (
    *_STOCK_LIMITS,
    Limit("on a GPU calls that need not be deterministic: its sums come in any order", _unordered_sums),
)

# --- the table -------------------------------------------------------------------------------------------------------

_HALVES = ("bfloat16", "float16")
_WIDE = ("float32", "float64")
_ALL = (*_WIDE, *_HALVES)
_GPU = ("float32", *_HALVES)


def _reference(module: str) -> dict[Backend, Kernel]:
    return {Backend.REFERENCE: Kernel(f"cvg_kernels.ops._{module}_reference")}


def _native(module: str, dtypes: tuple[str, ...], *limits: Limit) -> dict[Backend, Kernel]:
    kernel = Kernel(f"cvg_kernels.ops._{module}_native", ("cpu",), dtypes, limits)
    return {Backend.NATIVE: kernel}


def _triton(module: str, dtypes: tuple[str, ...], *limits: Limit) -> dict[Backend, Kernel]:
    return {Backend.TRITON: Kernel(f"cvg_kernels._triton.{module}", ("cuda",), dtypes, limits)}


def _specialised() -> dict[Backend, Kernel]:
    module = "cvg_kernels._triton.attention_specialised"
    return {Backend.TRITON_SPECIALISED: Kernel(module, ("cuda",), _HALVES, _SPECIALISED_LIMITS)}


def _cuda(module: str, dtypes: tuple[str, ...], *limits: Limit) -> dict[Backend, Kernel]:
    kernel = Kernel(f"cvg_kernels.ops._{module}_native", ("cuda",), dtypes, limits)
    return {Backend.CUDA: kernel}


def _stock(*limits: Limit) -> dict[Backend, Kernel]:
    kernel = Kernel("cvg_kernels.ops._attention_stock", ("cpu", "cuda"), _ALL, limits, asks=True)
    return {Backend.STOCK: kernel}


_CORE = _reference("attention") | _native("attention", _ALL) | _triton("attention", _GPU)
_CUTS = (_between(1, 64, "frames", "frames (or nodes)"), _between(0, 16, "hops"))

#: Operation → backend → kernel. A backward pass that has no line of its own has that of its operation.
KERNELS: dict[str, dict[Backend, Kernel]] = {
    "attention": _CORE | _stock(*_STOCK_LIMITS) | _specialised(),
    "attention_backward": _CORE | _stock(*_STOCK_BACKWARD_LIMITS) | _specialised(),
    "frame_band_attention": _CORE,
    "temporal_attention": _reference("temporal_attention")
    | _native("temporal_attention", _ALL)
    | _triton(
        "temporal_attention",
        _GPU,
        Limit("frames 1 to 128, in float32 to 32", _frames_in_registers),
        _between(1, 128, "head_dim"),
        _between(1, 128, "value_dim", "head_dim of value"),
    )
    | _cuda(
        "temporal_attention",
        _HALVES,
        _between(16, 128, "frames"),
        _between(1, 160, "head_dim"),
        _between(1, 160, "value_dim", "head_dim of value"),
    ),
    "temporal_maps": _reference("temporal_maps")
    | _native("temporal_maps", _ALL)
    | _triton(
        "temporal_maps",
        _GPU,
        Limit("frames 1 to 128, in float32 to 32", _frames_in_registers),
        _between(1, 128, "head_dim"),
    ),
    "path_flow": _reference("path_flow") | _native("path_flow", _WIDE) | _triton("path_flow", ("float32",)),
    "min_max_matmul": _reference("min_max_matmul")
    | _native("min_max_matmul", _WIDE)
    | _triton("min_max_matmul", ("float32",)),
    "token_peaks": _reference("token_peaks") | _native("token_peaks", _WIDE) | _triton("token_peaks", ("float32",)),
    "max_flow": _reference("max_flow") | _native("max_flow", _WIDE, *_CUTS) | _cuda("max_flow", _WIDE, *_CUTS),
    "coupled_max_flow": _reference("coupled_max_flow") | _native("coupled_max_flow", _WIDE),
    "guidance_mix": _reference("guidance_mix")
    | _native("guidance_mix", _ALL)
    | _triton("guidance_mix", _GPU, _between(2, 4, "predictions"), _without("rescale", "a rescale")),
    "depth_structure": {Backend.REFERENCE: Kernel("cvg_kernels.reference.depth_structure")},
}


def kernels_of(operation: str) -> dict[Backend, Kernel]:
    """The kernels of an operation, or of its backward pass.

    Args:
        operation: a key of `KERNELS`, or one with `_backward` after it.
    """
    kernels = KERNELS.get(operation)
    return KERNELS[operation.removesuffix("_backward")] if kernels is None else kernels
