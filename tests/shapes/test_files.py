"""The files of the shapes pipeline mean the same to every release,
and weights that are not the model's are refused.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn import functional

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.shapes.pipeline import WEIGHTS, load_pipeline  # noqa: E402
from tests.shapes.files import written_for_all  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

#: Prompts and the tokens that the shipped networks were trained with; the last two words are none of theirs.
IDS = {
    "a red circle moving left": [0, 30, 104, 83, 60, 86, 1],
    "a Blue  square moving up": [0, 30, 105, 87, 60, 78, 1],
    "quiz, dog": [0, 74, 10, 43, 1, 68, 39, 1],
}
PARTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def shipped():
    return load_pipeline()


def encoded(weights: dict[str, torch.Tensor], ids: list[int], heads: int) -> torch.Tensor:
    """CLIP's text encoder in float64, from the weights as the file names them."""
    w = {name.removeprefix("text_model."): weight.double() for name, weight in weights.items()}

    def linear(x, name):
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = w["embeddings.token_embedding.weight"][ids]
    x = x + w["embeddings.position_embedding.weight"][: len(ids)]
    for layer in (f"encoder.layers.{number}" for number in range(2)):
        inside = norm(x, f"{layer}.layer_norm1")
        q, k, v = (
            linear(inside, f"{layer}.self_attn.{name}_proj").unflatten(-1, (heads, -1)).transpose(0, 1)
            for name in "qkv"
        )
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(seen.transpose(0, 1).flatten(1), f"{layer}.self_attn.out_proj")
        inside = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(inside * torch.sigmoid(1.702 * inside), f"{layer}.mlp.fc2")
    return norm(x, "final_layer_norm")


@pytest.mark.parametrize("prompt", IDS)
def test_the_text_is_encoded_as_in_training(shipped, prompt):
    """The tokens are the known ones, and the encoder is that of the file: a random one is far off."""
    ids = shipped.tokenizer(prompt).input_ids
    assert ids == IDS[prompt]
    weights = load_file(WEIGHTS / "text_encoder" / "model.safetensors")
    want = encoded(weights, ids, shipped.text_encoder.config.num_attention_heads)
    with torch.no_grad():
        got = shipped.text_encoder(torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_what_ships_is_written_for_all():
    assert written_for_all(WEIGHTS)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("wrong", ["missing", "unexpected", "mismatched"])
def test_weights_of_another_model_are_refused(part, wrong, tmp_path):
    """By name: none is left random, none is left over."""
    folder = tmp_path / "pipeline"
    shutil.copytree(WEIGHTS, folder, ignore=shutil.ignore_patterns("classifier"))
    file = folder / part / PARTS[part]
    weights = load_file(file)
    name = sorted(weights)[-1]
    if wrong == "missing":
        del weights[name]
    elif wrong == "unexpected":
        name = f"{name}_of_another"
        weights[name] = torch.zeros(3)
    else:
        weights[name] = torch.zeros(weights[name].numel() + 1)
    changed = tmp_path / "changed.safetensors"
    save_file(weights, changed, metadata={"format": "pt"})
    shutil.move(changed, file)
    with pytest.raises(ArgumentError, match="^folder must hold ") as caught:
        load_pipeline(folder)
    message = str(caught.value)
    assert name.removeprefix("text_model.") in message and str(folder / part) in message
    assert f"with {wrong} " in message


def test_weights_under_other_names_are_refused(tmp_path):
    """Not one of them is the encoder's: a random one would do as well."""
    folder = tmp_path / "pipeline"
    shutil.copytree(WEIGHTS, folder, ignore=shutil.ignore_patterns("classifier"))
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"other.{name}": weight.clone() for name, weight in load_file(file).items()}
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match=r"with missing .* more; unexpected other\..* more$"):
        load_pipeline(folder)
