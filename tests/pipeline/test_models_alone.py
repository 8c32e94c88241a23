"""Entries of denoisers whose pipelines are too large for a test, or do more than a tiny one does: by the networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

pytest.importorskip("diffusers")

pytest.importorskip("transformers")

import diffusers  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.pipeline.layer_capture import LayerCapture  # noqa: E402
from cvg_kernels.pipeline.layers import attention_layers  # noqa: E402
from tests.pipelines import PIPELINES, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[1, 4]])


def check(network, arguments, grid, columns, begins) -> None:
    """Asserts that the maps of two tokens are the columns of softmax(q kᵀ) that stand for them, in every text layer.

    Args:
        network: the denoiser.
        arguments: that it is called with.
        grid: of the video's tokens.
        columns: layer → the keys of the two tokens.
        begins: layer → where the video begins among the queries.
    """
    stock, seen, now = functional.scaled_dot_product_attention, {}, [None]

    def spy(query, key, value, attn_mask=None, **rest):
        if now[0] is not None:
            logits = query.double() @ key.double().mT * query.shape[-1] ** -0.5
            if attn_mask is not None:
                logits = logits.masked_fill(~attn_mask, -torch.inf)
            seen[now[0]] = logits.softmax(-1).mean(1).float()
        return stock(query, key, value, attn_mask=attn_mask, **rest)

    handles = []
    for name, module in network.named_modules():
        if hasattr(module, "processor"):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: now.__setitem__(0, name)))
            handles.append(module.register_forward_hook(lambda *_: now.__setitem__(0, None)))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        network(**arguments)
    for handle in handles:
        handle.remove()

    layers = [layer.name for layer in attention_layers(network) if layer.kind == "cross"]
    assert set(layers) == set(columns)
    with torch.no_grad(), LayerCapture(network, IDS, layers) as capture:
        found = capture.run(lambda: network(**arguments))
    tokens = math.prod(grid)
    for name, maps in found.items():
        video = seen[name][0, begins[name] : begins[name] + tokens]
        wanted = torch.stack([video[:, column] for column in columns[name]])
        assert maps.shape == (1, 2, *grid)
        torch.testing.assert_close(maps[0].flatten(1), wanted, rtol=1e-4, atol=1e-6)


def test_motif_with_an_image_its_own_text_layers_and_a_decoder():
    """[video, image, text] in joint layers, the text alone in others; the decoder's blocks have no text."""
    network = diffusers.MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=3,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        qk_norm="rms_norm",
        text_embed_dim=8,
        image_embed_dim=6,
        rope_axes_dim=(4, 4, 4),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    ).eval()
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[:, :5] = True
    arguments = {
        "hidden_states": torch.randn(1, 4, 3, 2, 2),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 8),
        "encoder_attention_mask": mask,
        "image_embeds": torch.randn(1, 3, 6),
    }
    joint = ["transformer_blocks.0", *(f"single_transformer_blocks.{at}" for at in (0, 1))]
    columns = {f"{block}.attn": (12 + 3 + 1, 12 + 3 + 4) for block in joint}
    columns |= {f"{block}.cross_attn": (1, 4) for block in joint}
    check(network, arguments, (3, 2, 2), columns, dict.fromkeys(columns, 0))


def test_consisid():
    """Text first; the attention to the face is no layer that is watched."""
    network = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        num_layers=1,
        time_embed_dim=2,
        text_embed_dim=8,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=7,
        cross_attn_interval=1,
        use_rotary_positional_embeddings=False,
        is_train_face=True,
        cross_attn_dim_head=1,
        cross_attn_num_heads=1,
        LFE_id_dim=2,
        LFE_vit_dim=2,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=21,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    ).eval()
    arguments = {
        "hidden_states": torch.randn(1, 3, 8, 4, 6),
        "encoder_hidden_states": torch.randn(1, 7, 8),
        "timestep": torch.tensor([500]),
        "id_cond": torch.randn(1, 2),
        "id_vit_hidden": [torch.randn(1, 2, 2)],
    }
    layer = "transformer_blocks.0.attn1"
    check(network, arguments, (3, 2, 3), {layer: (1, 4)}, {layer: 7})


def test_ltx_with_frames_that_are_given_for_later():
    """Their tokens stand before those of the video, and coordinates tell how many there are."""
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=8,
    ).eval()
    rows, columns = 2, 3

    def coordinates(times):
        grid = torch.meshgrid(
            torch.tensor(times), torch.arange(rows) * 32.0, torch.arange(columns) * 32.0, indexing="ij"
        )
        return torch.stack(grid).flatten(1)

    given, video = coordinates([0.68, 1.0]), coordinates([0.0, 0.04, 0.36, 0.68])
    arguments = {
        "hidden_states": torch.randn(1, 36, 4),
        "encoder_hidden_states": torch.randn(1, 7, 8),
        "timestep": torch.full((1, 36), 500.0),
        "encoder_attention_mask": torch.ones(1, 7),
        "video_coords": torch.cat([given, video], 1)[None],
    }
    layer = "transformer_blocks.0.attn2"
    arguments["encoder_attention_mask"] = None
    check(network, arguments, (4, rows, columns), {layer: (1, 4)}, {layer: 12})


def test_kandinsky_whose_tokens_are_in_tiles():
    """Sparse attention that sees all blocks is the usual one, the tokens of a frame tile by tile: the maps are the
    same.
    """
    network = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        patch_size=(1, 2, 2),
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 8),
        visual_cond=False,
        attention_type="nabla",
    ).eval()
    for name, parameter in network.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    frames, rows, columns = 2, 16, 24  # two by three tiles of 8 × 8
    arguments = {
        "hidden_states": torch.randn(1, frames, 2 * rows, 2 * columns, 4),
        "encoder_hidden_states": torch.randn(1, 7, 8),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": torch.randn(1, 8),
        "visual_rope_pos": [torch.arange(size) for size in (frames, rows, columns)],
        "text_rope_pos": torch.arange(7),
    }
    layers = [layer.name for layer in attention_layers(network)]
    assert layers == [f"visual_transformer_blocks.{at}.cross_attention" for at in range(2)]
    blocks = frames * rows * columns // 64
    sparse = {"sta_mask": torch.ones(1, 1, blocks, blocks, dtype=torch.bool), "P": 1.0}
    found = []
    for params, backend in ((None, "native"), ({**sparse, "to_fractal": True}, "flex")):
        for block in network.visual_transformer_blocks:
            block.self_attention.set_attention_backend(backend)
        with torch.no_grad(), LayerCapture(network, IDS, layers) as capture:
            given = {**arguments, "sparse_params": params}
            found.append(capture.run(lambda given=given: network(**given)))
    usual, tiled = found
    for name in layers:
        assert usual[name].shape == (1, 2, frames, rows, columns)
        # its rotations are rounded to bfloat16
        torch.testing.assert_close(tiled[name], usual[name], rtol=2e-2, atol=1e-4)
    spread = usual[layers[0]].std() / usual[layers[0]].mean()
    assert spread > 0.05


def test_stable_video_diffusion_has_temporal_maps_and_no_words():
    pipe, options = PIPELINES["svd"].build()
    with pytest.raises(cvg.ArgumentError, match="attends to no text"):
        cvg.capture(pipe, ["cat"]).__enter__()
    stock, seen, now = functional.scaled_dot_product_attention, [], [None]

    def spy(query, key, value, attn_mask=None, **rest):
        if now[0]:
            maps = (query.double() @ key.double().mT * query.shape[-1] ** -0.5).softmax(-1)
            seen.append((now[0], maps.mean(1).float()))
        return stock(query, key, value, attn_mask=attn_mask, **rest)

    handles = []
    for name, module in pipe.unet.named_modules():
        if "temporal_transformer_blocks" in name and name.endswith("attn1"):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: now.__setitem__(0, name)))
            handles.append(module.register_forward_hook(lambda *_: now.__setitem__(0, None)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", spy)
        video = run(pipe, options)
    for handle in handles:
        handle.remove()
    with cvg.capture(pipe, temporal=True) as captured:
        torch.testing.assert_close(run(pipe, options), video, rtol=1e-4, atol=1e-4)
    records = iter(captured.records)
    for name, maps in seen:
        for branch, part in zip(("uncond", "cond"), maps.chunk(2), strict=True):
            record = next(records)
            assert (record.layer, record.branch, record.kind) == (name, branch, "temporal")
            torch.testing.assert_close(record.maps[0], part, rtol=1e-4, atol=1e-6)
    assert next(records, None) is None and seen
    with cvg.TemporalBand(step_size=0.1, stop=0.3).attach(pipe) as guided:
        moved = run(pipe, options)
    assert guided.guided == [(0, 0)] and (moved - video).abs().max() > 1e-4
