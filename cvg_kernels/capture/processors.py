"""The drop-in processors: a stock processor runs as it is, and its attention goes through our kernel.

Nothing of a processor's body is copied. While the wrapped processor runs, calls of
`torch.nn.functional.scaled_dot_product_attention` are handed to a handler; projections, norms, rotary embeddings and
everything else stay the model's own, in whatever diffusers release is installed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from cvg_kernels.capture.layers import Layer, attention_layers, denoisers_of
from cvg_kernels.capture.temporal import temporal_layer, video_layer
from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import attention_with_capture

#: (query, key, value, mask, scale) → out; `None` hands the call back to torch.
Handler = Callable[..., torch.Tensor | None]
#: The query of a layer's call → options of `temporal_attention` (a temporal layer) or `video_layer` that apply to it now.
Band = Callable[[torch.Tensor], dict[str, Any]]
_SDPA = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in {
            "query": None,
            "key": None,
            "value": None,
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": False,
            "scale": None,
            "enable_gqa": False,
        }.items()
    ]
)


class _Interception(TorchFunctionMode):
    """Hands scaled dot-product attention to a handler and leaves every other function alone."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _SDPA.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if given["dropout_p"] or given["is_causal"] or given["enable_gqa"]:
            raise ArgumentError(
                "attention with dropout, a causal mask or grouped heads cannot be captured; got "
                f"dropout_p={given['dropout_p']}, is_causal={given['is_causal']}, enable_gqa={given['enable_gqa']}"
            )
        self.calls += 1
        out = self.handler(
            given["query"], given["key"], given["value"], given["attn_mask"], given["scale"]
        )
        return func(*args, **kwargs) if out is None else out


class InterceptingProcessor:
    """A processor that runs another one with its attention handed to a handler.

    Made by `wrap`, which gives it the signature of the processor inside: diffusers drops call arguments that a
    processor's signature does not name.
    """

    _attention_backend = None  # diffusers writes these two on processors
    _parallel_config = None

    def __init__(self, inner: Any, name: str, handler: Handler, band: Band | None) -> None:
        self.inner = inner
        self.name = name
        self.handler = handler
        self.band = band

    @staticmethod
    def wrap(
        inner: Any, name: str, handler: Handler, band: Band | None = None
    ) -> InterceptingProcessor:
        """Wraps `inner`, or what `inner` wraps already.

        Args:
            inner: a diffusers processor.
            name: of its layer, for messages.
            handler: what computes the attention.
            band: how attention among frames is regularised; `None` keeps to what `inner` says. So capture sees the maps
                that the regularised layer has.
        """
        if isinstance(inner, InterceptingProcessor):
            band = band or inner.band
            inner = inner.inner

        @functools.wraps(type(inner).__call__)
        def __call__(self, *args: Any, **kwargs: Any):
            return self._run(*args, **kwargs)

        members = {"__call__": __call__}
        kind = type(f"Intercepting{type(inner).__name__}", (InterceptingProcessor,), members)
        return kind(inner, name, handler, band)

    def _run(self, *args: Any, **kwargs: Any):
        with _Interception(self.handler) as interception:
            result = self.inner(*args, **kwargs)
        if interception.calls == 0:
            raise ArgumentError(
                f"{self.name} cannot be captured: its processor {type(self.inner).__name__} does not call "
                "scaled_dot_product_attention; set the stock PyTorch 2 processor (attention backend 'native') first"
            )
        return result


def refuse_compiled(denoiser: nn.Module) -> None:
    """Checks that a denoiser is not compiled.

    Raises:
        ArgumentError: if it is; changing processors would not reach the compiled code.
    """
    if hasattr(denoiser, "_orig_mod") or getattr(denoiser, "_compiled_call_impl", None) is not None:
        raise ArgumentError(
            "the denoiser is compiled (torch.compile), and its compiled code would go on with the old processors: "
            "attach to the pipeline before compiling it, or give it the original module"
        )


@contextmanager
def installed(processors: dict[nn.Module, InterceptingProcessor]) -> Iterator[None]:
    """Sets processors on attention modules and puts the old ones back, whatever happens."""
    before = {module: module.processor for module in processors}
    try:
        for module, processor in processors.items():
            module.processor = processor
        yield
    finally:
        for module, processor in before.items():
            module.processor = processor


def band_of(module: nn.Module, query: torch.Tensor) -> dict[str, Any]:
    """The regularisation of a layer in its present call; none, and so empty, where frames do not attend to each other."""
    band = getattr(module.processor, "band", None)
    return {} if band is None else band(query)


def _kernel_handler(layer: Layer, backend: str) -> Handler:
    """Attention by our kernel with nothing kept: the drop-in swap."""

    def attend(query, key, value, mask, scale):
        band = band_of(layer.module, query)
        if layer.kind == "temporal":
            return temporal_layer(query, key, value, mask, scale, band, backend)[0]
        if band:
            return video_layer(query, key, value, mask, scale, backend, **band).out
        captured = attention_with_capture(
            query, key, value, [0], scale=scale, key_mask=per_key_mask(mask), backend=backend
        )
        return captured.out

    return attend


def per_key_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of scaled dot-product attention in the form our operations take: with four dimensions."""
    if mask is None:
        return None
    while mask.ndim < 4:
        mask = mask[None]
    return mask


class ProcessorSwap:
    """Handle of `use_processors`; `restore` puts the stock processors back."""

    def __init__(self, before: dict[nn.Module, Any]) -> None:
        self._before = before

    def restore(self) -> None:
        """Puts the processors back that were there before; more than once does no harm."""
        for module, processor in self._before.items():
            module.processor = processor
        self._before = {}


def use_processors(pipe: Any, *, backend: str = "auto") -> ProcessorSwap:
    """Lets every text and temporal attention layer of a pipeline compute with our kernel: the drop-in swap.

    The video is that of the stock pipeline to floating-point tolerance. Joint attention is text attention too.
    Self-attention keeps the stock kernel: it has no tokens to capture, and the fused kernels of torch serve it well.

    Args:
        pipe: a diffusers pipeline or a denoiser.
        backend: of `attention_with_capture`.

    Returns:
        A handle with `restore()`.

    Raises:
        ArgumentError: if the denoiser is compiled.
    """
    swapped = {}
    for denoiser in denoisers_of(pipe):
        refuse_compiled(denoiser)
        for layer in attention_layers(denoiser):
            if layer.kind != "self":
                swapped[layer.module] = InterceptingProcessor.wrap(
                    layer.module.processor, layer.name, _kernel_handler(layer, backend)
                )
    swap = ProcessorSwap({module: module.processor for module in swapped})
    for module, processor in swapped.items():
        module.processor = processor
    return swap


@contextmanager
def processors(pipe: Any, *, backend: str = "auto") -> Iterator[ProcessorSwap]:
    """`use_processors` for the length of a `with` block."""
    swap = use_processors(pipe, backend=backend)
    try:
        yield swap
    finally:
        swap.restore()
