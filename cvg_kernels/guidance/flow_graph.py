"""The small flow graphs in a denoiser:
a text layer, the layers that follow it, and the flow of tokens through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cvg_kernels.errors import ArgumentError
from cvg_kernels.ops import coupled_max_flow, path_flow, subgraph_max_flow
from cvg_kernels.pipeline.layers import (
    attention_layers,
    following_frames,
    frame_maps,
    spatial_partner,
    temporal_partners,
)
from cvg_kernels.pipeline.models import model_of
from cvg_kernels.reference import path_flow as reference

FlowForm = Literal["soft", "hard", "exact", "rollout", "cross"]


@dataclass(frozen=True)
class Group:
    """A cross-attention layer, the attention within frames beside it, and the temporal maps that follow.

    Where there are no temporal layers, these are the maps between frames of the attention in the next block, which
    spans the video.
    """

    cross: str
    temporal: tuple[str, ...] = ()
    spatial: str | None = None


def flow_groups(denoiser: nn.Module, form: FlowForm, spatial: bool) -> list[Group]:
    """Every text layer of a denoiser with the layers that its flow goes through.

    Args:
        denoiser: the network.
        form: `"cross"` leaves the text layers alone.
        spatial: let the flow pass through the attention within frames.

    Raises:
        ArgumentError: if there is no text layer, or none within frames where `spatial` asks for it.
    """
    layers, spans = attention_layers(denoiser), not model_of(denoiser).frames_in_batch
    over_frames = frame_maps(denoiser) if spans else {}
    groups = []
    for layer in layers:
        if layer.kind != "cross":
            continue
        if form == "cross":
            groups.append(Group(layer.name))
            continue
        beside = spatial_partner(layers, layer) if spatial else None
        if spatial and beside is None:
            raise ArgumentError(f"spatial: {layer.name} has no self-attention in its block")
        if spans:
            partners = following_frames(over_frames, layer)
        else:
            partners = [partner.name for partner in temporal_partners(layers, layer)]
        groups.append(Group(layer.name, tuple(partners), beside.name if beside else None))
    if not groups:
        raise ArgumentError("the denoiser has no text cross-attention layer to guide by")
    return groups


def flow_of(
    group: Group,
    maps: dict[str, torch.Tensor],
    form: FlowForm,
    temperature: float,
    order: Literal["tokens_first", "hops_first"],
    residual: Literal["average", "add"] | None,
    backend: str,
) -> torch.Tensor:
    """Flow of every token to every frame and position, `[B, K, F, h, w]`.

    The exact flow of a graph that couples the positions has the whole video for its sink: then the result is
    `[B, K, 1, 1, 1]`, the flow as a share of the video's F · h · w outputs.

    Args:
        group: the graph.
        maps: layer name → maps: cross `[B, K, F, h, w]`, spatial `[B, F, h·w, h·w]`, temporal `[B, h·w, F, F]`.
        form: `"soft"` and `"hard"` widest paths, `"exact"` maximum flow, `"rollout"` the product of the maps, or
            `"cross"`, the text layer alone.
        temperature: temperature of the soft form.
        order: order of the soft form's products, as for `path_flow`.
        residual: skip connections, as for `path_flow`.
        backend: which implementation of the operations to use.
    """
    cross = maps[group.cross]
    if form == "cross":
        return cross
    temporal = [maps[name] for name in group.temporal]
    spatial = maps[group.spatial] if group.spatial else None
    if form == "exact" and spatial is not None:
        flow = coupled_max_flow(cross.flatten(3), temporal, spatial, residual=residual, backend=backend).flow
        return (flow / cross[0, 0].numel())[:, :, None, None, None]
    if form == "exact":
        flow = subgraph_max_flow(cross.flatten(3), temporal, residual=residual, sink="frame", backend=backend).flow
    elif form == "rollout":
        flow = _rollout(cross.flatten(3), temporal, spatial, residual)
    else:
        flow = path_flow(
            cross.flatten(3),
            temporal,
            temperature=temperature if form == "soft" else None,
            order=order,
            residual=residual,
            spatial=spatial,
            backend=backend,
        )
    return flow.unflatten(-1, cross.shape[-2:])


def _rollout(
    cross: torch.Tensor,
    temporal: Sequence[torch.Tensor],
    spatial: torch.Tensor | None,
    residual: Literal["average", "add"] | None,
) -> torch.Tensor:
    """Attention through the layers as a product, with their skip connections: T₂ T₁ S X, `[B, K, F, h·w]`.

    "Quantifying Attention Flow in Transformers", whose rollout this is; its flow is `"exact"`.
    """
    flow = cross
    if spatial is not None:
        flow = torch.einsum("bfij,bkfj->bkfi", reference.residual_hop(spatial, residual), flow)
    for hop in temporal:
        flow = torch.einsum("blij,bkjl->bkil", reference.residual_hop(hop, residual), flow)
    return flow
