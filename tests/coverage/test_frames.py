"""Temporal maps of attention that spans the video, on one pipeline of each denoiser: against softmax(q kᵀ) in float64.

The oracle knows nothing of ours but the names of layers; where the video begins among the tokens is stated here.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance import Guidance  # noqa: E402
from cvg_kernels.pipeline.layer_capture import LayerCapture  # noqa: E402
from cvg_kernels.pipeline.layers import frame_maps  # noqa: E402
from tests.coverage import gradients, oracle  # noqa: E402
from tests.coverage.row import WORDS, Row, answers, same_video  # noqa: E402  # noqa: E402
from tests.coverage.table import LIMITS  # noqa: E402
from tests.pipelines import PIPELINES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

#: What rounding makes of a map, of a gradient, and of a denoiser's answers.
MAP, GRADIENT, OUTPUT = (LIMITS[what] for what in ("capture", "gradient", "output"))

#: The video is all there is, or stands last, behind a text, a condition or earlier frames.
LAST = (
    *("wan", "wan_vace", "wan_animate", "skyreels_v2", "chronoedit", "anyflow", "helios", "allegro", "cosmos"),
    *("kandinsky5", "cogvideox", "cogvideox15", "easyanimate", "ltx", "ltx_condition"),
)
#: All that is not the video stands behind it.
FIRST = ("hunyuan_video", "hunyuan_video15", "mochi", "motif_video", "ltx2")
#: One attention relates text and video: of a layer there are maps of words as well.
JOINT = (
    *("cogvideox", "cogvideox15", "easyanimate", "framepack", "hunyuan_video", "hunyuan_video15"),
    *("mochi", "motif_video"),
)


def begins(row: Row, tokens: int, grid) -> int:
    """Where the video begins in a layer of so many tokens."""
    video, name = math.prod(grid), row.case.name
    if name in FIRST:
        return 0
    if name == "framepack":  # [earlier frames, video, image, text without padding]
        given = row.watch.calls[row.first].arguments
        text = given["image_embeds"].shape[1] + int(given["encoder_attention_mask"].sum())
        return tokens - text - video
    assert name in LAST
    return tokens - video


def softmaxes(row: Row, watch: oracle.Watch, call: int, layer: str) -> list[torch.Tensor]:
    """Logits of a layer's attention in one call, float64 `[heads, N, N]` for each sample with the prompt."""
    seen = [one for one in watch.seen if one.call == call and one.layer == layer]
    if len(seen) == 1:
        rows = range(*row.rows(len(seen[0].query)).indices(len(seen[0].query)))
        parts = [(seen[0], at) for at in rows]
    else:  # a call for each sample
        parts = [(seen[at], 0) for at in range(*row.rows(len(seen)).indices(len(seen)))]
    found = []
    for one, at in parts:
        query, key = one.query[at].double(), one.key[at].double()
        key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        logits = query @ key.mT * (one.scale or query.shape[-1] ** -0.5)
        if one.mask is not None:
            mask = one.mask.expand(len(one.query), *one.mask.shape[1:])[at]
            hidden = mask.dtype == torch.bool
            logits = logits.masked_fill(~mask, -torch.inf) if hidden else logits + mask
        found.append(logits)
    return found


def between_frames(row: Row, logits: torch.Tensor, *, alone: bool = False) -> torch.Tensor:
    """Of `[heads, N, N]` the maps between frames at every place, `[h·w, F, F]`, mean over heads."""
    (grid,) = row.grids
    places, begin = grid[1] * grid[2], begins(row, logits.shape[-1], grid)
    at = begin + torch.arange(places)[:, None] + places * torch.arange(grid[0])  # [h·w, F]
    if alone:
        return logits[:, at[:, :, None], at[:, None, :]].softmax(-1).mean(0)
    return logits.softmax(-1)[:, at[:, :, None], at[:, None, :]].mean(0)


@pytest.mark.parametrize("row", [*LAST, *FIRST, "framepack"], indirect=True)
@pytest.mark.drawn(3)
def test_temporal_maps(row):
    """Of every layer, step and branch; in joint attention with words in the same run; the video is the stock one."""
    words = WORDS if row.case.name in JOINT else None
    with (
        oracle.watched(row.networks, attention=False) as watch,
        cvg.capture(row.pipe, words, temporal=True) as captured,
        cvg.trace_backends() as ran,
    ):
        video = row.run()
    row.restored()
    assert ("temporal_maps", "native") in ran or ("temporal_maps", "reference") in ran
    same_video(row, video)
    assert answers(row, watch) <= OUTPUT

    records = [one for one in captured.records if (one.kind, one.branch) == ("temporal", "cond")]
    layers = list(dict.fromkeys(record.layer for record in records))
    assert len(records) == len(layers) * len(row.prompted)
    of_words = {record.layer for record in captured.records if record.kind == "cross"}
    assert of_words & set(layers) == (set(layers) if words else set())
    (grid,) = row.grids
    by_call = iter(records)
    for call in row.prompted:
        for _ in layers:
            record = next(by_call)
            assert record.grid == grid and record.words == ()
            logits = softmaxes(row, row.watch, call, record.layer)
            wanted = torch.stack([between_frames(row, one) for one in logits])
            assert record.maps.shape == wanted.shape
            assert float((record.maps - wanted).abs().max()) <= MAP
            assert float(wanted.min()) > 0


class Probe(Guidance):
    """Notes the gradient of Σ weights · maps at the first step, and moves nothing."""

    def __init__(self, weights: dict[str, torch.Tensor], found: dict) -> None:
        super().__init__(stop=0.01)
        vars(self).update(weights=weights, found=found)

    def before_step(self, call, run) -> None:
        z = call.latents.detach().requires_grad_()
        no_words = torch.zeros(len(z), 0, dtype=torch.int64)
        names = list(frame_maps(call.denoiser))
        with LayerCapture(call.denoiser, no_words, (), names) as layers:
            maps = layers.run(lambda: call.denoise(z))
            loss = sum((maps[name][0] * self.weights[name]).sum() for name in names)
            (gradient,) = torch.autograd.grad(loss, z)
        for one in maps.values():  # of the frames alone
            torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))
        self.found.update(latents=z.detach(), scale=call.scale, gradient=gradient)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("row", ["wan", "cogvideox", "hunyuan_video", "ltx", "mochi", "kandinsky5"], indirect=True)
def test_the_gradient_on_the_latents(row, monkeypatch):
    """Of a random loss of the maps that guidance is given, against eager PyTorch."""
    (grid,) = row.grids
    names = list(frame_maps(row.networks[0]))
    weights = {name: torch.randn(grid[1] * grid[2], grid[0], grid[0]) for name in names}
    found: dict = {}
    with pytest.warns(cvg.GuidanceWarning, match="Probe did nothing"), Probe(weights, found).attach(row.pipe):
        row.run()
    row.restored()

    def seen_maps(watch: oracle.Watch, call: int) -> list[tuple[str, torch.Tensor]]:
        layers = [(name, name.removesuffix(":frames")) for name in names]
        return [
            (name, between_frames(row, softmaxes(row, watch, call, layer)[0], alone=True)) for name, layer in layers
        ]

    monkeypatch.setattr(row, "seen_maps", seen_maps)
    assert gradients.error(row, weights, found) <= GRADIENT


@pytest.mark.parametrize("name", ["sana_video", "anyflow_far"])
def test_no_layer_relates_the_frames(name):
    """Linear attention has no maps; what is refused says so before anything runs."""
    pipe, _ = PIPELINES[name].build()
    with (
        pytest.raises(cvg.ArgumentError, match="temporal must be False for .*: no layer"),
        cvg.capture(pipe, WORDS, temporal=True),
    ):
        pass
    with pytest.raises(cvg.ArgumentError, match="must have layers in which frames attend"):
        cvg.TemporalBand().attach(pipe).__enter__()


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_vico_follows_its_flow_from_frame_to_frame(name):
    """Its video is another one than that of the text layers alone, and its loss falls."""
    row = Row.of(name)
    videos = []
    for flow in ("soft", "cross"):
        vico = cvg.Vico(WORDS, flow=flow, step_size=0.05, iterations=3, stop=0.34)
        with vico.attach(row.pipe) as run:
            videos.append(row.run())
        losses = [float(entry["loss"]) for entry in run.history if entry["step"] == 0]
        assert losses[-1] < losses[0]
    assert not torch.allclose(*videos, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_maps_under_a_band_are_those_of_the_banded_attention(name):
    """And come as probabilities of all of it, or of the frames alone; the row's maximum moves with the gradient."""
    row, sigma, strength = Row.of(name), 0.7, 2.0
    (grid,) = row.grids
    band = cvg.VSTAR(sigma=sigma, strength=strength, stop=0.01)
    with band.attach(row.pipe), cvg.capture(row.pipe, temporal=True, steps=0) as captured:
        row.run()
    records = [one for one in captured.records if one.branch == "cond"]
    first = records[0]  # later layers are given what the band has made of this one
    (logits,) = softmaxes(row, row.watch, row.first, first.layer)
    tokens, video = logits.shape[-1], math.prod(grid)
    begin = begins(row, tokens, grid)
    frame = torch.arange(video) // (grid[1] * grid[2])
    near = (-(frame[:, None] - frame).double().square() / (2 * sigma**2)).exp()
    added = torch.zeros_like(logits)
    added[:, begin : begin + video, begin : begin + video] = strength * near
    banded = logits + logits.amax(-1, keepdim=True) * added
    assert float((first.maps[0] - between_frames(row, banded)).abs().max()) <= MAP
    assert float((first.maps[0] - between_frames(row, logits)).abs().max()) > 100 * MAP
