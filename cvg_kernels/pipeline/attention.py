"""One attention of a layer by our kernels: its output under a band, and the maps that are wanted of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch.nn.functional import pad

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import (
    FrameBand,
    attention_alone,
    attention_with_capture,
    capture_maps,
    frame_band_attention,
    temporal_attention,
    temporal_maps,
)
from cvg_kernels.pipeline.banded_frames import banded_video
from cvg_kernels.pipeline.geometry import Geometry
from cvg_kernels.pipeline.layers import Layer
from cvg_kernels.pipeline.models import Grid
from cvg_kernels.pipeline.parallel import context_of, whole_maps


@dataclass(frozen=True)
class Place:
    """Where attention is computed: what is known of a call before its tensors are.

    Attributes:
        layer: the layer.
        number: which of the calls that the layer makes in one forward, 0 first.
        disturbs: whether PAG's processor runs, which lets the disturbed samples attend to nothing.
    """

    layer: Layer
    number: int
    disturbs: bool

    @property
    def of_text(self) -> bool:
        """Whether the keys are those of the text (or of text and video), not of an image prompt beside it.

        Wan 2.1's image-to-video model attends to the image first, an IP-Adapter to the text.
        """
        return self.layer.range is not None or self.layer.text_call in (None, self.number)

    @property
    def sample(self) -> int | None:
        """The sample that it is for, in a layer that attends once for each."""
        return self.number if self.layer.text_call is None else None


@dataclass(frozen=True)
class Attention(Place):
    """A call of scaled dot-product attention within a layer.

    Attributes:
        query: `[B', heads, N, D]`, as the layer made it; key and value likewise.
        key: `[B', heads, M, D]`.
        value: `[B', heads, M, D]`.
        mask: mask of `scaled_dot_product_attention`, or `None`.
        scale: factor of the logits; `None` is D^-½.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None

    @property
    def of_text(self) -> bool:
        """As of a `Place`; where the user has named the range of the text, only the numbers of tokens tell."""
        if self.layer.range is not None:
            return self.layer.range.holds(self.query.shape[2], self.key.shape[2])
        return super().of_text


@dataclass(frozen=True)
class MapRequest:
    """The maps that somebody wants of a layer.

    Attributes:
        geometry: geometry of the denoiser call.
        receive: is given the maps and the layer's grid (F, h, w): cross `[B, K, F, h, w]` (or
            `[B, heads, K, F, h, w]`), temporal `[B, h·w, F, F]`, and self, of a model whose self-attention stays
            within a frame, `[B, F, h·w, h·w]`, with the attending frame or position first.
        over_frames: for attention that spans the video, whether the temporal maps are wanted and not those of words:
            `"whole"`: probabilities of that attention; `"alone"`: of the frames alone, whose rows sum to 1.
        token_ids: `[B, K]`, tokens to capture in cross-attention, on the device of the layer.
        head_reduction: reduction over the heads of cross maps, `"mean"` or `"none"`.
        backend: which implementation to use.
    """

    geometry: Geometry
    receive: Callable[[torch.Tensor, Grid], None]
    over_frames: Literal["whole", "alone"] | None = None
    token_ids: torch.Tensor | None = None
    head_reduction: Literal["mean", "none"] = "mean"
    backend: str = "auto"


def attend(
    attention: Attention, band: dict[str, Any], requests: Sequence[MapRequest], backend: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Computes the output of a layer, and for each request maps as the operations give them, for `hand_over`.

    Nothing here looks at what changes from call to call but tensors: this is what becomes part of a compiled graph.

    Args:
        attention: the layer's call.
        band: options of `temporal_attention` (a temporal layer) or of `frame_band_attention` (others); empty: none.
        requests: wanted maps.
        backend: which implementation of the operations to use.

    Raises:
        ArgumentError: for a mask where frames attend to each other.
    """
    kind = attention.layer.kind
    if kind == "temporal":
        return _temporal(attention, band, requests, backend)
    if any(request.over_frames for request in requests):
        return _over_video(attention, band, requests, backend)
    if band:
        return _under_band(attention, band, requests, backend)
    if kind == "self":
        return _within_frames(attention, requests, backend)
    return _to_text(attention, requests, backend)


def _temporal(attention, band, requests, backend):
    _refuse_mask("temporal attention", attention.mask)
    result = temporal_attention(
        attention.query,
        attention.key,
        attention.value,
        scale=attention.scale,
        capture=bool(requests),
        backend=backend,
        **band,
    )
    return result.out, [result.maps] * len(requests)


def _over_video(attention, band, requests, backend):
    """Attention that spans the video, some of whose requests are for maps between frames."""
    words = [request for request in requests if request.over_frames is None]
    whole = any(request.over_frames == "whole" for request in requests)
    options = _band_options(attention, band) if band else {"key_mask": _mask_of_video(attention)}
    lse, of_words = None, []
    if words:
        out, of_words, lse = _captured_with_lse(attention, words, backend, **options)
    elif whole:
        out, _, lse = attention_with_capture(
            attention.query, attention.key, attention.value, None, scale=attention.scale, backend=backend, **options
        )
    else:
        out, _ = _under_band(attention, band, (), backend) if band else _to_text(attention, (), backend)
    given = iter(of_words)
    return out, [
        next(given)
        if request.over_frames is None
        else _between_frames(attention, lse if request.over_frames == "whole" else None, band, request, backend)
        for request in requests
    ]


def _between_frames(attention, lse, band, request: MapRequest, backend: str) -> torch.Tensor:
    """The maps between frames at every place, `[B', h·w, F, F]`, the places as the tokens are ordered."""
    geometry, tokens = request.geometry, attention.query.shape[2]
    grid = geometry.grid(tokens)
    begin = geometry.video_begins(attention.layer, tokens)
    if attention.key.shape[2] != tokens or begin < 0:
        raise ArgumentError(
            f"{attention.layer.name} attends from {tokens} tokens to {attention.key.shape[2]} and not from a video of "
            f"{grid} to itself: it has no maps between its frames; do without temporal maps (Vico: flow='cross')"
        )
    if context_of(geometry.denoiser) is not None:
        raise ArgumentError(
            f"{attention.layer.name} is shared out among processes: maps between frames cannot be had under context "
            "parallelism; do without temporal maps (Vico: flow='cross')"
        )
    query, key, scale = attention.query, attention.key, attention.scale
    options = {"query_start": begin, "key_start": begin, "key_mask": _mask_of_video(attention)}
    if band:
        _refuse_mask("attention over a video", attention.mask)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query, key = banded_video(query, key, grid, begin, scale, band, backend)
        lse = None if lse is None else lse[:, :, begin : begin + math.prod(grid)]
        options = {}
    return temporal_maps(query, key, lse, grid, scale=scale, backend=backend, **options)


def _under_band(attention, band, requests, backend):
    """Attention over the tokens of a video, with or without those of a text, with a band by frame distance."""
    options = _band_options(attention, band)
    if requests:
        return _captured(attention, requests, backend, **options)
    given, frames = attention, band["frames"]
    found = frame_band_attention(
        given.query,
        given.key,
        given.value,
        frames,
        frames,
        scale=given.scale,
        backend=backend,
        **_without_frames(band),
    )
    return found.out, []


def _band_options(attention: Attention, band: dict[str, Any]) -> dict[str, Any]:
    """A band as `attention_with_capture` takes it."""
    _refuse_mask("attention over a video", attention.mask)
    return {"band": FrameBand(band["frames"], band["frames"], **_without_frames(band))}


def _without_frames(band: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in band.items() if name != "frames"}


def _within_frames(attention, requests, backend):
    """Self-attention within a frame: every key is captured."""
    captured = attention_with_capture(
        attention.query,
        attention.key,
        attention.value,
        torch.arange(attention.key.shape[2], device=attention.query.device),
        scale=attention.scale,
        key_mask=per_key_mask(attention.mask),
        backend=backend,
    )
    return captured.out, [captured.maps] * len(requests)


def _to_text(attention, requests, backend):
    if requests:
        return _captured(attention, requests, backend, key_mask=_mask_of_video(attention))
    mask = per_key_mask(attention.mask) if backend == "auto" else _mask_of_video(attention)
    out = attention_alone(
        attention.query, attention.key, attention.value, scale=attention.scale, key_mask=mask, backend=backend
    )
    return out, []


def _mask_of_video(attention: Attention) -> torch.Tensor | None:
    """The mask as the queries of the video have it."""
    mask = per_key_mask(attention.mask)
    if attention.layer.masks_alike and mask is not None:
        mask = mask[:, :1, :1]  # of the first head and query, as of every other of the video
    return mask


def _captured(attention, requests, backend, **options):
    """The output and the maps of words."""
    return _captured_with_lse(attention, requests, backend, **options)[:2]


def _captured_with_lse(attention, requests, backend, **options):
    """The output, with the maps of the first request in the same pass, those of others by themselves; log-sum-exp."""
    options |= {"scale": attention.scale, "backend": backend}
    out, found, lse = None, [], None
    for request in requests:
        geometry, keys = request.geometry, attention.key.shape[2]
        ids, present = geometry.keys(attention.layer, keys, request.token_ids, attention.sample)
        each, rest = divmod(attention.query.shape[0], ids.shape[0])
        if not each or rest:
            raise ArgumentError(
                f"{attention.layer.name} attends with {attention.query.shape[0]} samples at a time, and the call has "
                f"{ids.shape[0]}: whose maps these are takes an entry of its denoiser in the table"
            )
        if each > 1:  # the frames of a sample, which lie in the batch
            ids = ids.repeat_interleave(each, dim=0)
        wanted = {**options, "head_reduction": request.head_reduction}
        if out is None:
            out, maps, lse = attention_with_capture(attention.query, attention.key, attention.value, ids, **wanted)
        else:
            maps = capture_maps(attention.query, attention.key, ids, **wanted).maps
        if context_of(geometry.denoiser) is not None:
            maps = _of_all_processes(maps, attention, geometry)
        if present is not None:  # those of a token that is not there are zero
            present = present.repeat_interleave(each, dim=0)
            maps = maps * present.view(present.shape[0], *[1] * (maps.ndim - 3), -1, 1)
        found.append(maps)
    return out, found, lse


def _of_all_processes(maps, attention, geometry) -> torch.Tensor:
    """Cross maps with the shares of other processes, under context parallelism."""
    queries = math.prod(geometry.grid(maps.shape[-1]))
    heads = attention.query.shape[1]
    return whole_maps(maps, geometry.denoiser, attention.layer.module, heads, queries)


def hand_over(place: Place, request: MapRequest, maps: torch.Tensor) -> None:
    """Arranges maps over the video and gives them to who wants them.

    Args:
        place: where they are from.
        request: the request for them.
        maps: as `attend` returned them: cross `[B', (heads,) K, N]`, temporal `[B·h·w, F, F]` (`[B', h·w, F, F]` of
            attention that spans the video), self `[B·F, h·w, h·w]` with the position that is looked at first.

    Raises:
        ArgumentError: for temporal maps of a part of the frames.
    """
    kind, geometry = place.layer.kind, request.geometry
    if request.over_frames:
        grid = geometry.grid(maps.shape[1])
        if geometry.tile > 1:
            places = torch.arange(maps.shape[1], device=maps.device)
            maps = maps.index_select(1, _row_by_row(places, (1, *grid[1:]), geometry.tile)[0])
        request.receive(maps, grid)
    elif kind == "temporal":
        _check_frames(place, geometry.latents[2], maps.shape[-1])
        maps = maps.unflatten(0, (geometry.samples(place.disturbs), -1))
        request.receive(maps, geometry.grid(maps.shape[1]))
    elif kind == "self":
        maps = maps.mT.unflatten(0, (geometry.latents[0], -1))  # [B, F, h·w, h·w]
        request.receive(maps, geometry.grid(maps.shape[2]))
    else:
        grid = geometry.grid(tokens := maps.shape[-1])
        if geometry.per_frame(tokens):
            batch, frames = geometry.latents[0], grid[0]
            maps = maps.unflatten(0, (batch, frames)).movedim(1, -2)  # [B, (heads,) K, F, h·w]
        else:
            begin = geometry.video_begins(place.layer, tokens)
            maps = maps[..., begin : begin + math.prod(grid)]  # without the queries of a text
            maps = _row_by_row(maps, grid, geometry.tile)
        request.receive(maps.unflatten(-1, grid[1:]), grid)


def _check_frames(place: Place, frames: int, seen: int) -> None:
    if seen != frames:
        raise ArgumentError(
            f"{place.layer.name} sees {seen} of {frames} frames at a time (FreeNoise's windows): its maps cannot "
            "be put together; do without temporal maps (Vico: flow='cross'), or take a context_length of the whole "
            "clip"
        )


def _row_by_row(maps: torch.Tensor, grid: Grid, tile: int) -> torch.Tensor:
    """Maps `[…, F·h·w]` as `[…, F, h·w]`, from the order of tiles to that of rows."""
    frames, rows, columns = grid
    if tile == 1:
        return maps.unflatten(-1, (frames, -1))
    maps = maps.unflatten(-1, (frames, rows // tile, columns // tile, tile, tile))
    return maps.transpose(-3, -2).flatten(-4)


@lru_cache(64)
def token_frames(grid: Grid, tokens: int, device: torch.device, begin: int | None = None) -> torch.Tensor:
    """Returns the frame of each token, int32 `[tokens]`; −1 for those that are not of the video.

    It is made once for all layers and steps, and not to be written into.

    Args:
        grid: (F, h, w), filled frame by frame.
        tokens: how many there are.
        device: device of the result.
        begin: where those of the video begin; `None`: so that they are the last.

    Raises:
        ArgumentError: if there are too few for the grid.
    """
    beside = tokens - math.prod(grid)
    begin = beside if begin is None else begin
    if beside < 0:
        raise ArgumentError(f"a layer of {tokens} tokens cannot hold a video of {grid}")
    with torch.inference_mode(False):  # else a later call with gradients could not keep it
        frames = torch.arange(grid[0], dtype=torch.int32, device=device)
        return pad(frames.repeat_interleave(grid[1] * grid[2]), (begin, beside - begin), value=-1)


def per_key_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of scaled dot-product attention in the form our operations take: with four dimensions."""
    if mask is None:
        return None
    while mask.ndim < 4:
        mask = mask[None]
    return mask


def _refuse_mask(what: str, mask: torch.Tensor | None) -> None:
    if mask is not None:
        raise ArgumentError(f"{what} with a mask is not supported, got one of shape {tuple(mask.shape)}")
