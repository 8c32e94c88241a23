"""The classes of calls in which kernels compete: what `cvg-kernels tune` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from cvg_kernels.auto import SHORT_KEYS
from cvg_kernels.kernels import Backend, Facts
from cvg_kernels.ops import _attention_reference as reference
from cvg_kernels.ops._attention_call import AttentionCall, AttentionGrads, Needed
from cvg_kernels.ops._choice import kernel_for
from cvg_kernels.ops.temporal_attention import temporal_attention

#: The operations in which kernels compete; each of the others has one kernel on every device.
OPERATIONS = ("attention", "temporal_attention")
TOKENS = 8

Tensors = Sequence[torch.Tensor | None]


class Run(NamedTuple):
    """A call that is ready."""

    by: Callable[[Backend], Tensors]  #: computes it with a kernel
    exact: Callable[[], Tensors]  #: computes it with the reference in float64


class Case(Protocol):
    """A class of calls to tune."""

    operation: str
    dtype: torch.dtype

    def facts(self, device: torch.device) -> Facts:
        """Of a call as large as models have it."""

    def sizes(self) -> dict[str, Any]:
        """Of that call, for the report."""

    def ready(self, device: torch.device, *, small: bool) -> Run:
        """Makes such a call, or a small one of the same class."""


# --- attention -------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """An attention layer: batch, heads, queries, keys, head dimension."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int


CPU_LAYERS = (
    Layer(4, 8, 2560, 77, 64),
    Layer(1, 12, 4096, 512, 128),
    Layer(1, 16, 2274, 2274, 64),
    Layer(1, 8, 2048, 2048, 128),
)
GPU_LAYERS = (
    Layer(16, 5, 2560, 77, 64),
    Layer(1, 12, 32760, 512, 128),
    Layer(1, 30, 8192, 8192, 64),
    Layer(1, 12, 8192, 8192, 128),
)


class AttentionCase(NamedTuple):
    """Attention with capture on one layer, forward, or backward with these gradients."""

    layer: Layer
    dtype: torch.dtype
    gradients: tuple[str, str] | None = None  #: `through` and `gradients` of the class

    @property
    def operation(self) -> str:
        """The line of the table."""
        return "attention" if self.gradients is None else "attention_backward"

    def facts(self, device: torch.device) -> Facts:
        """Of a call as large as models have it."""
        through, wanted = self.gradients or ("", "")
        layer = self.layer
        return Facts(
            device,
            self.dtype,
            layer.batch,
            layer.heads,
            layer.queries,
            layer.keys,
            layer.dim,
            layer.dim,
            TOKENS,
            need_query=bool(wanted),
            need_key=wanted == "all",
            need_value=wanted == "all",
            grad_out=bool(wanted),
            grad_maps=through == "maps",
        )

    def sizes(self) -> dict[str, Any]:
        """Of that call, for the report."""
        return self.layer._asdict()

    def ready(self, device: torch.device, *, small: bool) -> Run:
        """Makes such a call, or a small one of the same class."""
        batch, heads, queries, keys, dim = self.layer
        if small:
            batch, heads, queries, keys = 1, 2, 200, min(keys, SHORT_KEYS + 76)

        def made(length: int) -> torch.Tensor:  # as the layers' projections leave them
            return torch.randn(batch, length, heads, dim, device=device).to(self.dtype).transpose(1, 2)

        ids = torch.arange(1, TOKENS + 1, device=device).expand(batch, -1).contiguous()
        query, key, value = made(queries), made(keys), made(keys)
        call = AttentionCall(query, key, value, ids, None, None, None, dim**-0.5, True)
        exact = call._replace(query=query.double(), key=key.double(), value=value.double())
        if self.gradients is None:
            return Run(
                lambda backend: self._module(backend, device).forward(call)[:2], lambda: reference.forward(exact)[:2]
            )
        through, wanted = self.gradients
        needed = Needed(True, wanted == "all", wanted == "all")
        maps = torch.randn(batch, TOKENS, queries, device=device) if through == "maps" else None
        grads = AttentionGrads(made(queries), maps, None)
        wide = AttentionGrads(grads.out.double(), None if maps is None else maps.double(), None)
        if small:
            result = reference.forward(call)
        else:
            facts = self._replace(gradients=None).facts(device)
            result = kernel_for("attention", Backend.AUTO, facts).module.forward(call)
        return Run(
            lambda backend: self._module(backend, device).backward(call, result, grads, needed)[:3],
            lambda: reference.backward(exact, reference.forward(exact), wide, needed)[:3],
        )

    def _module(self, backend: Backend, device: torch.device):
        return kernel_for(self.operation, backend, self.facts(device)).module


# --- temporal attention ----------------------------------------------------------------------------------------------


class TemporalCase(NamedTuple):
    """Temporal attention, forward and backward together: one kernel serves both."""

    positions: int
    heads: int
    frames: int
    dim: int
    dtype: torch.dtype
    operation: str = "temporal_attention"

    def facts(self, device: torch.device) -> Facts:
        """Of a call as large as models have it."""
        return Facts(device, self.dtype, frames=self.frames, head_dim=self.dim, value_dim=self.dim)

    def sizes(self) -> dict[str, Any]:
        """Of that call, for the report."""
        names = ("positions", "heads", "frames", "dim")
        return {name: getattr(self, name) for name in names}

    def ready(self, device: torch.device, *, small: bool) -> Run:
        """Makes such a call, or a small one of the same class."""
        shape = (24 if small else self.positions, self.heads, self.frames, self.dim)
        given = [torch.randn(shape, device=device).to(self.dtype) for _ in range(4)]

        def computed(tensors: list[torch.Tensor], backend: Backend) -> Tensors:
            *tensors, grad = tensors
            leaves = [tensor.requires_grad_() for tensor in tensors]
            out = temporal_attention(*leaves, sigma=4.0, backend=backend).out
            return (out, *torch.autograd.grad(out, leaves, grad))

        return Run(
            lambda backend: computed([tensor.detach() for tensor in given], backend),
            lambda: computed([tensor.double() for tensor in given], Backend.REFERENCE),
        )


def cases(device: torch.device, operations: Iterable[str], *, quick: bool = False) -> Iterator[Case]:
    """The classes of calls in which kernels compete on a device.

    Args:
        device: where.
        operations: some of `OPERATIONS`.
        quick: a quarter of the queries or positions.
    """
    low = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16, torch.float32)
    divisor = 4 if quick else 1
    if "attention" in operations:
        for dtype in low:
            for layer in CPU_LAYERS if device.type == "cpu" else GPU_LAYERS:
                layer = layer._replace(queries=layer.queries // divisor)
                yield AttentionCase(layer, dtype)
                for through in ("out", "maps"):
                    for wanted in ("query", "all"):
                        yield AttentionCase(layer, dtype, (through, wanted))
    if "temporal_attention" in operations and device.type == "cuda":
        for frames in (16, 32, 64):
            for dim in (64, 128):
                yield TemporalCase(2560 // divisor, 8, frames, dim, torch.float16)
