"""A stand-in for the UNet of VideoCrafter (lvdm): its modules, names, layouts and calls, on two levels, untrained."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class CrossAttention(nn.Module):
    def __init__(self, query_dim: int, context_dim: int | None, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.heads, self.scale = heads, dim_head**-0.5
        self.relative_position = False
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        if mask is not None:
            sim = sim.masked_fill(~(mask[:, None] > 0.5), -torch.finfo(sim.dtype).max)
        out = torch.einsum("bhij,bhjd->bhid", sim.softmax(-1), v)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, context_dim: int | None) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim // heads)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim // heads)
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.checkpoint = False

    def forward(self, x, context=None, mask=None):
        if self.checkpoint:
            return checkpoint(self._forward, x, context, mask, use_reentrant=False)
        return self._forward(x, context, mask)

    def _forward(self, x, context, mask):
        x = self.attn1(self.norm1(x), context=None, mask=mask) + x
        x = self.attn2(self.norm2(x), context=context, mask=mask) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(dim, heads, context_dim)])

    def forward(self, x, context):  # [B·T, C, h, w]
        tokens = x.flatten(2).mT
        for block in self.transformer_blocks:
            tokens = block(tokens, context=context)
        return x + tokens.mT.unflatten(-1, x.shape[-2:])


class TemporalTransformer(nn.Module):
    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.only_self_att = context_dim is None
        self.causal_attention = False
        self.norm = nn.GroupNorm(4, dim)
        self.proj_in, self.proj_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(dim, heads, context_dim)])

    def forward(self, x, context=None):  # [B, C, T, h, w]
        batch, _, frames, rows, columns = x.shape
        y = self.norm(x).permute(0, 3, 4, 2, 1).flatten(0, 2)  # b c t h w -> (b h w) t c
        y, mask = self.proj_in(y), None
        if self.causal_attention:
            mask = torch.ones(frames, frames).tril().expand(y.shape[0], -1, -1)
        if not self.only_self_att:
            context = context.repeat_interleave(rows * columns, dim=0)
        for block in self.transformer_blocks:
            y = block(y, context=None if self.only_self_att else context, mask=mask)
        y = self.proj_out(y).unflatten(0, (batch, rows, columns))
        return x + y.permute(0, 4, 3, 1, 2)


class TimestepEmbedSequential(nn.Sequential):
    """Gives every layer what it takes: images `(b t) c h w`, or the video."""

    def forward(self, x, context, batch):
        for layer in self:
            if isinstance(layer, TemporalTransformer):
                video = x.unflatten(0, (batch, -1)).transpose(1, 2)
                x = layer(video, context).transpose(1, 2).flatten(0, 1)
            elif isinstance(layer, SpatialTransformer):
                frames = x.shape[0] // batch
                x = layer(x, context.repeat_interleave(frames, dim=0))
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """Two levels, with `SpatialTransformer` and `TemporalTransformer` on each; 4 channels of latents."""

    def __init__(self, context_dim: int = 6, temporal_context: bool = False) -> None:
        super().__init__()
        dim, heads, context = 8, 2, context_dim if temporal_context else None
        self.embed = nn.Linear(1, dim)
        self.inlet = nn.Conv2d(4, dim, 1)
        self.init_attn = TimestepEmbedSequential(TemporalTransformer(dim, heads))

        def level(*before: nn.Module) -> TimestepEmbedSequential:
            return TimestepEmbedSequential(
                *before, SpatialTransformer(dim, heads, context_dim), TemporalTransformer(dim, heads, context)
            )

        self.input_blocks = nn.ModuleList([level(), level(nn.Conv2d(dim, dim, 3, stride=2, padding=1))])
        self.output_blocks = nn.ModuleList([level(nn.Upsample(scale_factor=2))])
        self.out = nn.Conv2d(dim, 4, 1)

    def forward(self, x, timesteps, context=None, fps=16, **kwargs):
        batch = x.shape[0]
        time = self.embed(timesteps.to(x.dtype)[:, None] / 1000)
        h = self.inlet(x.transpose(1, 2).flatten(0, 1))
        h = h + time.repeat_interleave(x.shape[2], dim=0)[..., None, None]
        h = self.init_attn(h, context, batch)
        for block in self.input_blocks:
            h = block(h, context, batch)
        for block in self.output_blocks:
            h = block(h, context, batch)
        return self.out(h).unflatten(0, (batch, -1)).transpose(1, 2)
