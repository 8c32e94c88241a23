"""Losses on the scores and the maps of words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def fairness_loss(peaks: torch.Tensor, kind: str = "min") -> torch.Tensor:
    """How unequally the tokens are seen, one value per sample.

    Args:
        peaks: A `[B, K]`, the score of each word.
        kind: `"min"`: max_k max(0, 1 − A_k), which raises the weakest word (Vico, paper eq. 4 and released code);
            `"variance"`: Σ_k (A_k − Ā)² (the paper's ablation).

    Returns:
        `[B]`.

    Examples:
        >>> cvg.guidance.fairness_loss(torch.tensor([[0.9, 0.4]]))
        tensor([0.6000])
    """
    if kind == "min":
        return (1 - peaks).clamp_min(0).amax(1)
    return (peaks - peaks.mean(1, keepdim=True)).square().sum(1)


def overlaps(maps: torch.Tensor) -> torch.Tensor:
    """How much the maps of words overlap, each taken as a distribution over the places of a frame, mean over frames.

        O_kl = mean_f Σ_x min(p_kfx, p_lfx),   p_kf = A_kf / Σ_x A_kfx

    Args:
        maps: A `[B, K, F, h, w]`, not negative.

    Returns:
        `[B, K, K]` in [0, 1]; 1 on the diagonal.
    """
    shares = _over_places(maps)
    return torch.minimum(shares[:, :, None], shares[:, None]).sum(-1).mean(-1)


def concentration(maps: torch.Tensor) -> torch.Tensor:
    """How much each word's map is gathered in few places of a frame: mean_f Σ_x p_kfx², as for `overlaps`.

    Args:
        maps: A `[B, K, F, h, w]`, not negative.

    Returns:
        `[B, K]` in [0, 1].
    """
    return _over_places(maps).square().sum(-1).mean(-1)


def _over_places(maps: torch.Tensor) -> torch.Tensor:
    """The maps as distributions over the places of a frame, `[B, K, F, h·w]`."""
    flat = maps.flatten(3)
    return flat / flat.sum(-1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def separation_loss(maps: torch.Tensor, pairs: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
    """How much the maps of different words overlap, mean over all pairs of words.

    Args:
        maps: A `[B, K, F, h, w]`, not negative, K at least 2.
        pairs: not looked at.

    Returns:
        `[B]` in [0, 1].

    The idea of A-STAR's segregation loss ("A-STAR: Test-time Attention Segregation and Retention"), on video.

    Examples:
        >>> apart = torch.eye(2).view(1, 2, 1, 1, 2)  # two words, each at a place of its own
        >>> cvg.guidance.separation_loss(apart)
        tensor([0.])
    """
    words = maps.shape[1]
    between = overlaps(maps).sum((1, 2)) - words
    return between / (words * (words - 1))


def binding_loss(maps: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """How far the maps of attributes are from those of what they belong to, and how near to those of others.

        mean over pairs (a, n) of  1 − O_an + mean over words u of neither of (O_au + O_nu) / 2

    Args:
        maps: A `[B, K, F, h, w]`, not negative.
        pairs: numbers of the attribute and of its word.

    Returns:
        `[B]` in [0, 2].

    The idea of "Linguistic Binding in Diffusion Models" (SynGen), with the overlap in place of its Kullback-Leibler
    divergences, which have no bound.

    Examples:
        >>> apart = torch.eye(2).view(1, 2, 1, 1, 2)  # an attribute and its word, each at a place of its own
        >>> cvg.guidance.binding_loss(apart, [(0, 1)])
        tensor([1.])
    """
    overlap, losses = overlaps(maps), []
    joined = {tuple(sorted(pair)) for pair in pairs}
    for attribute, word in pairs:
        # what belongs to the same word ("big red circle") is no other
        kin = {attribute, word}.union(*(pair for pair in joined if {attribute, word} & set(pair)))
        others = [one for one in range(maps.shape[1]) if one not in kin]
        loss = 1 - overlap[:, attribute, word]
        if others:
            loss = loss + (overlap[:, attribute, others] + overlap[:, word, others]).mean(1) / 2
        losses.append(loss)
    return torch.stack(losses).mean(0)


def concentration_loss(maps: torch.Tensor, pairs: Sequence[tuple[int, int]] = ()) -> torch.Tensor:
    """How widely the map of the most scattered word is spread over the places of a frame.

        1 − min_k mean_f Σ_x p_kfx²,   p_kf = A_kf / Σ_x A_kfx

    A word all of whose attention is at one place has 0, one that is even over n places 1 − 1/n.

    Args:
        maps: A `[B, K, F, h, w]`, not negative.
        pairs: not looked at.

    Returns:
        `[B]` in [0, 1].

    Ours: on the world of scenes the sum of squared shares tells from the first steps on which words will be lost, and
    the score of Vico and of Attend-and-Excite does not (docs/scenes.md).

    Examples:
        >>> spread = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).view(1, 2, 1, 1, 2)  # over two places, and at one
        >>> cvg.guidance.concentration_loss(spread)
        tensor([0.5000])
    """
    return 1 - concentration(maps).amin(1)


#: Losses of the words' maps, by name; they take maps and pairs.
MAP_LOSSES: dict[str, Callable[[torch.Tensor, Sequence[tuple[int, int]]], torch.Tensor]] = {
    "concentration": concentration_loss,
    "separation": separation_loss,
    "binding": binding_loss,
}


def band_distance(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Squared distance of temporal attention maps to a Gaussian band, mean over rows and positions.

        mean_i Σ_j (A_ij − Â_ij)²,   Â_ij ∝ exp(−(i − j)² / 2σ²) with rows that sum to 1

    Args:
        maps: A `[B, positions, F, F]`, row = attending frame.
        sigma: width of the band in frames.

    Returns:
        `[B]`.

    The regularisation of "VSTAR: Generative Temporal Nursing" as a loss, for guidance by its gradient.

    Examples:
        >>> cvg.guidance.band_distance(torch.eye(4).view(1, 1, 4, 4), sigma=0.05)
        tensor([0.])
    """
    frames = torch.arange(maps.shape[-1], device=maps.device, dtype=maps.dtype)
    band = (-(frames[:, None] - frames).square() / (2 * sigma**2)).softmax(-1)
    return (maps - band).square().sum(-1).mean((1, 2))


def diagonal_roughness(maps: torch.Tensor, fraction: float) -> torch.Tensor:
    """How unevenly temporal attention runs along its diagonals, at the places where it is most uneven.

    A place's roughness is the mean over offsets k = 0, ±1, ±2 and frames of (A_{f+1, f+1+k} − A_{f, f+k})²; the loss
    is its mean over the roughest places.

    Args:
        maps: A `[B, positions, F, F]`, row = attending frame.
        fraction: of the places, the roughest, in (0, 1]; one at least.

    Returns:
        `[B]`. 0 for two frames or fewer.

    Our reading of the abstract of "TeDiO: Temporal Diagonal Optimization for Training-Free Coherent Video Diffusion"
    (arXiv 2605.14136), whose equations we have not seen.

    Examples:
        >>> cvg.guidance.diagonal_roughness(torch.eye(8).view(1, 1, 8, 8), fraction=0.5)
        tensor([0.])
    """
    frames = maps.shape[-1]
    steps = [maps.diagonal(k, -2, -1).diff(dim=-1).square() for k in range(-2, 3) if frames - abs(k) > 1]
    if not steps:
        return maps.sum((1, 2, 3)) * 0
    each = torch.cat(steps, -1).mean(-1)  # [B, positions]
    return each.topk(max(1, round(fraction * each.shape[1])), dim=1).values.mean(1)


def motion_variance(video: torch.Tensor, over: str = "max") -> torch.Tensor:
    """How unevenly a video changes from frame to frame, at the worst place or on the mean of all.

        max over (h, w), or mean, of  mean_c Var_f |x_{c, f+1} − x_{c, f}|

    Args:
        video: x `[B, C, F, H, W]`.
        over: `"max"` or `"mean"`.

    Returns:
        `[B]`.

    The loss of "FlowMo: Variance-Based Flow Guidance for Coherent Motion in Video Generation", as released; the
    variance is that over the F − 1 changes, not corrected for their number.

    Examples:
        >>> brighter = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 3, 4, 8, 8)  # by as much in every frame
        >>> cvg.guidance.motion_variance(brighter)
        tensor([0.])
    """
    change = video.diff(dim=2).abs()
    each = change.var(dim=2, unbiased=False).mean(1)  # [B, H, W]
    return each.amax((1, 2)) if over == "max" else each.mean((1, 2))


def diagonality(maps: torch.Tensor) -> torch.Tensor:
    """How much temporal attention lies along the diagonal: Pearson's correlation of row and column under A's weights.

    Args:
        maps: A `[..., F, F]`, not negative.

    Returns:
        `[...]` in [−1, 1]; 1 for a diagonal, 0 for even attention. 0 for a single frame.

    Examples:
        >>> cvg.guidance.diagonality(torch.full((4, 4), 0.25))
        tensor(0.)
    """
    frames = torch.arange(maps.shape[-1], device=maps.device, dtype=maps.dtype)
    weights = maps / maps.sum((-2, -1), keepdim=True)
    rows, columns = weights.sum(-1), weights.sum(-2)  # marginals

    def moments(marginal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = (marginal * frames).sum(-1)
        return mean, (marginal * frames.square()).sum(-1) - mean.square()

    (row_mean, row_variance), (column_mean, column_variance) = moments(rows), moments(columns)
    together = torch.einsum("...ij,i,j->...", weights, frames, frames) - row_mean * column_mean
    spread = (row_variance * column_variance).clamp_min(torch.finfo(maps.dtype).tiny).sqrt()
    return together / spread
