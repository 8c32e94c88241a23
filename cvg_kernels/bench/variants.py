"""The uses of Triton kernels that are compiled without a GPU: layers of real models, each in one precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class Variant(Protocol):
    """One use. Tensors are on the meta device: nothing but their shapes counts."""

    name: str
    dtype: str

    def launches(self, processors: int = 132, hopper: bool = True, parts: tuple[str, ...] | None = None) -> Iterator:
        """Every kernel launch that it makes.

        Args:
            processors: multiprocessors of the GPU.
            hopper: whether it is of the kind of sm_90.
            parts: which, of the names that the variant gives them; `None`: all.
        """


@dataclass(frozen=True)
class AttentionVariant:
    """Attention with capture, on the layout that diffusers has: `[B, N, H, D]` seen as `[B, H, N, D]`.

    Parts: `forward`, `maps` (without values), `capture` (the log-sum-exp is known), `query` (the gradient of the query
    alone) and `all` (all gradients).
    """

    name: str
    dtype: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    tokens: int = 8
    masked: bool = False  #: with a key bias
    biased: bool = False  #: with a token bias
    banded: bool = False  #: with a band by frame distance

    def launches(self, processors: int = 132, hopper: bool = True, parts: tuple[str, ...] | None = None) -> Iterator:
        """See `Variant`."""
        import torch

        from cvg_kernels._triton.attention_backward import backward_launches
        from cvg_kernels._triton.attention_forward import capture_launches, forward_launches
        from cvg_kernels.ops._attention_call import AttentionGrads, Needed

        parts = parts or ("forward", "maps", "capture", "query", "all")
        call, machine = self._call(), {"processors": processors, "hopper": hopper}
        launches, result = forward_launches(call, **machine)
        if "forward" in parts:
            yield from launches
        if "maps" in parts and call.token_ids is not None:
            yield from forward_launches(call._replace(value=None), **machine)[0]
        if "capture" in parts and call.token_ids is not None:
            yield from capture_launches(call, result.lse, processors=processors)[0]
        grads = AttentionGrads(torch.empty_like(result.out), result.maps, None)
        for part in ("query", "all"):
            if part in parts:
                every = part == "all"
                needed = Needed(True, every, every, every and self.biased)
                yield from backward_launches(call, result, grads, needed, **machine)[0]

    def _call(self):
        import torch

        from cvg_kernels.ops._attention_call import AttentionCall, Band

        dtype = getattr(torch, self.dtype)
        with torch.device("meta"):
            query, key, value = (
                torch.empty(self.batch, length, self.heads, self.dim, dtype=dtype).transpose(1, 2)
                for length in (self.queries, self.keys, self.keys)
            )
            ids = torch.empty(self.batch, self.tokens, dtype=torch.int64) if self.tokens else None
            key_bias = torch.empty(self.batch, self.keys) if self.masked else None
            token_bias = torch.empty(self.batch, self.tokens, self.queries) if self.biased else None
            band = None
            if self.banded:
                frames = (torch.empty(n, dtype=torch.int32) for n in (self.queries, self.keys))
                band = Band(*frames, 2.0, 1.0, True)
        return AttentionCall(query, key, value, ids, key_bias, token_bias, band, 0.1, True)


@dataclass(frozen=True)
class FlowVariant:
    """Path flow in both forms and token peaks, forward and backward."""

    name: str
    tokens: int
    frames: int
    height: int
    width: int
    dtype: str = "float32"

    def launches(self, processors: int = 132, hopper: bool = True, parts: tuple[str, ...] | None = None) -> Iterator:
        """See `Variant`."""
        import torch

        from cvg_kernels._triton import path_flow, token_peaks

        positions = self.height * self.width
        with torch.device("meta"):
            cross = torch.empty(1, self.tokens, self.frames, positions)
            hop = torch.empty(1, positions, self.frames, self.frames)
        for temperature in (None, 0.01):
            forward, flows, hops = path_flow.forward_launches(cross, [hop], temperature, "average")
            yield from forward
            yield from path_flow.backward_launches(flows[-1], flows, hops, temperature, "average", [True])[0]
        flow = cross.unflatten(-1, (self.height, self.width))
        launches, (blocks, sums) = token_peaks.forward_launches(flow, 100.0, 0.5)
        yield from launches
        peaks = blocks.amax((-2, -1))
        launch, marks = token_peaks.hit_launch(flow, sums, blocks, peaks, 100.0, 0.5)
        yield launch
        yield from token_peaks.gradient_launches(peaks, flow, sums, *marks, 100.0, 0.5)[0]


@dataclass(frozen=True)
class TemporalVariant:
    """Temporal attention with a band: with and without maps, and backward to the band as well."""

    name: str
    dtype: str
    positions: int
    heads: int
    frames: int
    dim: int

    def launches(self, processors: int = 132, hopper: bool = True, parts: tuple[str, ...] | None = None) -> Iterator:
        """See `Variant`."""
        import torch

        from cvg_kernels._triton import temporal_attention

        shape = (3, 1, self.positions, self.frames, self.heads, self.dim)
        with torch.device("meta"):
            given = torch.empty(shape, dtype=getattr(torch, self.dtype)).transpose(3, 4).unbind(0)
            band = torch.empty(self.frames, self.frames)
        for capture in (False, True):
            launch, (out, maps) = temporal_attention.forward_launch(*given, band, 0.1, True, capture)
            yield launch
        for grad_maps, to_band in ((None, False), (maps, False), (maps, True)):
            yield temporal_attention.backward_launch(
                out, grad_maps, *given, band, 0.1, True, True, True, True, True, to_band
            )[0]


@dataclass(frozen=True)
class MapsVariant:
    """Maps between frames out of joint attention: with the log-sum-exp and without, and their gradients."""

    name: str
    dtype: str
    heads: int
    frames: int
    places: int
    dim: int
    text: int = 0  #: tokens before the video
    masked: bool = False  #: with a key bias

    def launches(self, processors: int = 132, hopper: bool = True, parts: tuple[str, ...] | None = None) -> Iterator:
        """See `Variant`."""
        import torch

        from cvg_kernels._triton import temporal_maps
        from cvg_kernels.ops._temporal_maps_call import Targets, Video

        tokens, dtype = self.text + self.frames * self.places, getattr(torch, self.dtype)
        with torch.device("meta"):
            shape = (2, 1, tokens, self.heads, self.dim)
            query, key = torch.empty(shape, dtype=dtype).transpose(2, 3).unbind(0)
            lse = torch.empty(1, self.heads, tokens)
            bias = torch.empty(1, tokens) if self.masked else None
        video = Video(self.frames, self.places, self.text, self.text)
        for total in (lse, None):
            # With heads where the maps are of the frames alone, so that each form is compiled once.
            call = video.call(query, key, total, bias, 0.1, total is not None)
            launch, maps = temporal_maps.forward_launch(call)
            yield launch
            yield temporal_maps.backward_launch(call, maps, Targets(*call[:3]))


VARIANTS: tuple[Variant, ...] = (
    AttentionVariant("AnimateDiff cross", "bfloat16", 16, 8, 4096, 77, 40),
    AttentionVariant("VideoCrafter2 cross", "bfloat16", 16, 5, 2560, 77, 64),
    AttentionVariant("Wan-1.3B cross", "bfloat16", 1, 12, 32760, 512, 128),
    AttentionVariant("CogVideoX-2B joint", "bfloat16", 1, 30, 17776, 17776, 64),
    AttentionVariant("LTX cross, masked", "float16", 1, 32, 4992, 128, 64, masked=True),
    AttentionVariant("head_dim 256", "bfloat16", 1, 8, 4096, 512, 256),
    AttentionVariant("VideoCrafter2 cross", "float32", 16, 5, 2560, 77, 64),
    AttentionVariant("Wan-1.3B cross", "float32", 1, 12, 32760, 512, 128),
    FlowVariant("VideoCrafter2 flow", 77, 16, 40, 64),
    FlowVariant("Wan 480p flow", 512, 21, 30, 52),
    TemporalVariant("VideoCrafter2 16 frames", "bfloat16", 2560, 5, 16, 64),
    TemporalVariant("VideoCrafter2 64 frames", "bfloat16", 2560, 5, 64, 64),
    TemporalVariant("AnimateDiff 16 frames", "float16", 4096, 8, 16, 40),
    TemporalVariant("VideoCrafter2 16 frames", "float32", 2560, 5, 16, 64),
    AttentionVariant("Wan-1.3B band", "bfloat16", 1, 12, 32760, 32760, 128, 0, banded=True),
    AttentionVariant("CogVideoX-2B band", "bfloat16", 1, 30, 17776, 17776, 64, 8, banded=True),
    AttentionVariant("Wan-1.3B band", "float32", 1, 12, 32760, 32760, 128, 0, banded=True),
    MapsVariant("maps, D 40", "float16", 8, 16, 1560, 40, 77, masked=True),
    MapsVariant("maps, CogVideoX-2B", "bfloat16", 30, 13, 1350, 64, 226),
    MapsVariant("maps, D 80", "bfloat16", 12, 21, 1560, 80),
    MapsVariant("maps, D 96", "bfloat16", 12, 21, 1560, 96),
    MapsVariant("maps, HunyuanVideo", "bfloat16", 24, 33, 3600, 128),
    MapsVariant("maps, D 128", "float32", 12, 21, 1560, 128),
    AttentionVariant("VideoCrafter2 words", "bfloat16", 16, 5, 2560, 77, 64, 16, biased=True),
)
