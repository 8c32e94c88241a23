"""Captured maps on every tiny pipeline against softmax(q kᵀ) of its stock run, layer by layer and branch by branch."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from tests.pipeline.matrix import KNOWN, METHODS, ROUNDING, WORDS  # noqa: E402
from tests.pipelines import PIPELINES, PROMPT, denoisers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPORAL = [name for name in KNOWN if PIPELINES[name].temporal]
#: Parts of the names of layers that go over the frames alone.
OVER_FRAMES = ("motion_modules", "temp_attentions", "transformer_in", "temporal_transformer_blocks")


@dataclass
class Seen:
    """An attention of the stock run: which call of a denoiser, which layer, and its softmax, mean over heads."""

    call: int
    text: int  # tokens of the text that the denoiser was given
    layer: str
    maps: torch.Tensor  # [B', N, M]


@contextmanager
def watched(pipe, found: list[Seen]):
    """Notes every attention of the denoisers in a block, in float64, by hooks of torch and a spy on its function."""
    now: dict = {"call": -1, "text": 0, "layer": None}
    stock = functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **rest):
        if now["layer"] is not None:
            logits = query.double() @ key.double().mT * (scale or query.shape[-1] ** -0.5)
            logits = logits if attn_mask is None else logits + attn_mask
            maps = logits.softmax(-1).mean(1).float()
            found.append(Seen(now["call"], now["text"], now["layer"], maps))
        return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **rest)

    def enter_denoiser(module, args, arguments):
        text = arguments["encoder_hidden_states"] if "encoder_hidden_states" in arguments else args[2]
        now.update(call=now["call"] + 1, text=text.shape[1])

    handles = []
    for denoiser in denoisers(pipe):
        network = denoiser.get_base_model() if hasattr(denoiser, "get_base_model") else denoiser
        handles.append(network.register_forward_pre_hook(enter_denoiser, with_kwargs=True))
        for name, module in network.named_modules():
            if hasattr(module, "processor"):
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: now.update(layer=name)))
                handles.append(module.register_forward_hook(lambda *_: now.update(layer=None)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        yield
    for handle in handles:
        handle.remove()


def branches_of(case, seen: Seen, each: int):
    """The maps of each branch, with `each` rows of a batch for one video."""
    if not case.batched:
        assert len(seen.maps) == each
        return [(case.branches[seen.call % len(case.branches)], seen.maps)]
    parts = seen.maps.split(each)  # of a layer that PAG disturbs, the last branch is not there
    return list(zip(case.branches, parts, strict=len(parts) == len(case.branches)))


def text_maps(case, seen: Seen) -> torch.Tensor | None:
    """The rows of the video and the columns of the text, if the layer attends to it."""
    if any(part in seen.layer for part in OVER_FRAMES):
        return None
    places, keys = seen.maps.shape[1:]
    if case.denoiser.startswith("CogVideoX"):  # one sequence, which the text begins
        return seen.maps[:, seen.text :, : seen.text] if places == keys else None
    across = "attn2" in seen.layer
    return seen.maps if across and keys == seen.text else None


def grids_of(case) -> set[tuple[int, int, int]]:
    """The grids that the layers of a network may have, from the latents and its sizes."""
    frames, rows, columns = case.latents
    if case.denoiser.startswith("UNet"):
        return {(frames, rows, columns), (frames, -(-rows // 2), -(-columns // 2))}
    together = 2 if case.name == "cogvideox15" else 1
    return {(frames // together, rows // 2, columns // 2)}


def words_at(pipe) -> list[list[int]]:
    """Where the words stand in the text, from the tokens of their own."""
    ids = pipe.tokenizer(PROMPT).input_ids
    return [[ids.index(pipe.tokenizer.convert_tokens_to_ids(w)) for w in word.split()] for word in WORDS]


@pytest.mark.parametrize("built", KNOWN, indirect=True)
@pytest.mark.drawn(18)
def test_the_maps_of_words(built):
    """One record for each text layer, step and branch; each is that of the stock run."""
    case, pipe = built.case, built.pipe
    refused = METHODS["cvg"].refused(case)  # what needs words, and layers that see the video as a whole
    if refused:
        with pytest.raises(cvg.ArgumentError, match=refused), cvg.capture(pipe, WORDS):
            built.run()
        return built.is_as_before()

    found: list[Seen] = []
    with watched(pipe, found):
        assert torch.equal(built.run(), built.stock)
    with cvg.capture(pipe, WORDS) as captured:
        video = built.run()
    torch.testing.assert_close(video, built.stock, rtol=1e-4, atol=ROUNDING)

    frames = case.latents[0] if case.denoiser.startswith(("UNet", "Latte")) else 1
    places = words_at(pipe)
    wanted = []
    for seen in found:
        maps = text_maps(case, seen)
        if maps is None:
            continue
        words = torch.stack([maps[..., at].sum(-1) for at in places], 1)  # [B', K, N]
        cut = Seen(seen.call, seen.text, seen.layer, words)
        for branch, part in branches_of(case, cut, frames):
            step = seen.call // (1 if case.batched else len(case.branches)) % built.steps
            wanted.append((step, seen.layer, branch, part.transpose(0, 1).flatten(1)))  # [K, F·N]
    layers = {layer for _, layer, _, _ in wanted}
    steps = built.steps * case.rounds
    assert len(captured.records) == len(wanted) == len(layers) * steps * len(case.branches)
    for record, (step, layer, branch, maps) in zip(captured.records, wanted, strict=True):
        assert (record.run, record.step, record.layer, record.branch) == (0, step, layer, branch)
        assert record.kind == "cross" and record.words == tuple(WORDS)
        assert record.grid in grids_of(case) and record.maps.shape == (1, 2, *record.grid)
        torch.testing.assert_close(record.maps[0].flatten(1), maps, rtol=1e-4, atol=1e-6)
    assert captured.heat_map("cat").shape == max(record.grid for record in captured.records)
    built.is_as_before()


@pytest.mark.drawn(6)
@pytest.mark.parametrize("built", TEMPORAL, indirect=True)
def test_temporal_maps(built):
    case, pipe = built.case, built.pipe
    refused = METHODS["temporal_band"].refused(case)
    if refused:
        with pytest.raises(cvg.ArgumentError, match=refused), cvg.capture(pipe, temporal=True):
            built.run()
        return built.is_as_before()

    found: list[Seen] = []
    with watched(pipe, found):
        built.run()
    with cvg.capture(pipe, temporal=True) as captured:
        video = built.run()
    torch.testing.assert_close(video, built.stock, rtol=1e-4, atol=ROUNDING)

    seen_over_frames = [seen for seen in found if any(part in seen.layer for part in OVER_FRAMES)]
    sizes = {math.prod(grid[1:]): grid for grid in grids_of(case)}
    records = iter(captured.records)
    disturbed = 0
    for seen in seen_over_frames:
        record = next(records)
        each = record.maps.shape[1]
        assert each in sizes and record.grid == sizes[each]
        parts = branches_of(case, seen, each)
        disturbed += len(case.branches) - len(parts)
        for number, (branch, part) in enumerate(parts):
            record = record if number == 0 else next(records)
            assert (record.kind, record.layer, record.branch) == ("temporal", seen.layer, branch)
            assert record.step == seen.call % built.steps
            torch.testing.assert_close(record.maps[0], part, rtol=1e-4, atol=1e-6)
    assert next(records, None) is None
    steps = built.steps * case.rounds
    layers = {seen.layer for seen in seen_over_frames}
    assert len(captured.records) == len(layers) * steps * len(case.branches) - disturbed > 0
    built.is_as_before()
