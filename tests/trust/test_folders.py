"""Folders of models: nothing in them is run, each fault is named in one line, and no network is asked unasked."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import AutoencoderKL, UNetMotionModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPTextModel  # noqa: E402

from cvg_kernels import generate  # noqa: E402
from cvg_kernels.cli import main  # noqa: E402
from cvg_kernels.composition import CompositionClassifier  # noqa: E402
from cvg_kernels.errors import ArgumentError  # noqa: E402
from cvg_kernels.model_folders import options_for  # noqa: E402
from cvg_kernels.shapes.pipeline import WEIGHTS, load_pipeline  # noqa: E402
from tests.trust.files import BAD_JSON, BAD_TENSORS, pickled, saved_by_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped pipeline to spoil."""
    copy = tmp_path / "pipeline"
    shutil.copytree(WEIGHTS, copy, ignore=shutil.ignore_patterns("classifier", "editor"))
    return copy


def change(path: Path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(load, *names: object) -> str:
    with pytest.raises(ArgumentError) as caught:
        load()
    text = str(caught.value)
    assert all(str(name) in text for name in names), text
    assert "\n" not in text and len(text) < 700
    return text


def both_ways(folder: Path, *names: object) -> None:
    """By our own function, and as `generate --model` loads any pipeline."""
    refused(lambda: load_pipeline(folder), *names)
    refused(lambda: generate.load_pipeline(generate.Job("", folder, model=str(folder))), *names)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("torchs", [False, True])
def test_pickled_weights_are_named_and_not_run(part, torchs, folder, tmp_path):
    mark = tmp_path / "mark"
    (weights,) = (folder / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    if torchs:
        saved_by_torch(weights.with_name(name), mark)
    else:
        weights.with_name(name).write_bytes(pickled(mark))
    weights.unlink()
    both_ways(folder, name, "never loaded")
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_left_alone(folder, tmp_path):
    for part, name in (("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        saved_by_torch(folder / part / name, tmp_path / "mark")
    assert load_pipeline(folder).unet.config.in_channels == 4
    assert not (tmp_path / "mark").exists()


@pytest.mark.drawn(6)
@pytest.mark.parametrize(
    "settings",
    [
        {"_class_name": ["mine", "MyPipeline"]},
        {"_class_name": None},
        {"_class_name": "../mine"},
        {"unet": ["mine", "MyNetwork"]},
        {"unet": ["os", "system"]},
        {"unet": ["antigravity", "x"]},
        {"unet": ["diffusers", ["x"]]},
        {"unet": ["diffusers"]},
        {"../../unet": ["diffusers", "UNetMotionModel"]},
    ],
)
def test_no_code_of_a_folder_is_run(settings, folder, tmp_path, monkeypatch):
    """Whether it lies in the folder, where the program runs, or in Python."""
    mark = tmp_path / "mark"
    code = f"import os\nos.mkdir({str(mark)!r})\nclass MyPipeline: pass\nclass MyNetwork: pass\n"
    for place in (folder, folder / "unet", tmp_path):
        (place / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    change(folder / "model_index.json", **settings)
    both_ways(folder, folder / "model_index.json")
    assert not mark.exists()


@pytest.mark.drawn(12)
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("name", ["cut off", "empty", "list", "deep", "twice", "NaN", "utf-16", "huge"])
def test_settings_that_are_none(name, file, folder):
    (folder / file).write_bytes(BAD_JSON[name][0])
    both_ways(folder, folder / file)


@pytest.mark.drawn(8)
@pytest.mark.parametrize("data", [b"", b"[]", b'{"a": "b"}', b"[" * 100_000, b"\xff\xfe"])
@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_tokenizers_that_are_none(file, data, folder):
    """Whatever the libraries make of it: a tokenizer, or one line."""
    (folder / "tokenizer" / file).write_bytes(data)
    try:
        load_pipeline(folder)
    except ArgumentError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


@pytest.mark.drawn(6)
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_weights_that_are_none(name, folder):
    (folder / UNET).write_bytes(BAD_TENSORS[name])
    refused(lambda: load_pipeline(folder), folder / UNET)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    "part, settings, why",
    [
        ("unet", {"block_out_channels": [8192, 8192]}, "asks for"),
        ("text_encoder", {"hidden_size": 16384}, "asks for"),
        ("text_encoder", {"vocab_size": 2**40}, "asks for|does not load"),
        ("text_encoder", {"num_hidden_layers": 2**31}, "at most 4096"),
        ("unet", {"layers_per_block": 10**9}, "at most 4096"),
        ("unet", {"layers_per_block": [2, 10**9]}, "at most 4096"),
        ("unet", {"block_out_channels": "wide"}, "does not load"),
        ("unet", {"block_out_channels": []}, "does not load"),
        ("vae", {"down_block_types": ["os.system"]}, "does not load"),
        ("text_encoder", {"hidden_size": -4}, "does not load"),
        ("text_encoder", {"num_attention_heads": 0}, "does not load"),
    ],
)
def test_a_configuration_cannot_take_the_memory(part, settings, why, folder, monkeypatch):
    """It is held against the weights on the meta device: what it asks for is never allocated."""
    change(folder / part / "config.json", **settings)
    kind = {"unet": UNetMotionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[part]
    monkeypatch.setattr(kind, "from_pretrained", lambda *given, **more: pytest.fail("it was loaded"))
    text = refused(lambda: load_pipeline(folder), folder / part)
    assert re.search(why, text)


@pytest.mark.parametrize(
    "target", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "evil.bin", 7, None]
)
def test_weights_lie_in_their_folder(target, folder, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes((folder / UNET).read_bytes())
    names = list(load_file(folder / UNET))
    (folder / UNET).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))
    both_ways(folder, f"{folder / UNET}.index.json")


def test_weights_in_several_files_load(folder):
    weights = load_file(folder / UNET)
    (folder / UNET).unlink()
    place = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        name = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        save_file({one: weights[one].clone() for one in names}, folder / "unet" / name, {"format": "pt"})
        place |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index))
    found = load_pipeline(folder).unet.state_dict()
    assert all(torch.equal(found[name], weights[name].to(found[name].dtype)) for name in weights)


def test_links_as_in_the_hubs_cache(folder, tmp_path):
    blob = tmp_path / "blob"
    shutil.move(folder / UNET, blob)
    (folder / UNET).symlink_to(blob)
    assert load_pipeline(folder)


# --- the classifier --------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(tmp_path):
    shutil.copytree(WEIGHTS / "classifier", tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.mark.parametrize("name", BAD_JSON)
def test_settings_of_a_classifier_that_are_none(name, classifier):
    (classifier / "classifier.json").write_bytes(BAD_JSON[name][0])
    refused(lambda: CompositionClassifier.load(classifier), classifier / "classifier.json")


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_weights_of_a_classifier_that_are_none(name, classifier):
    (classifier / "classifier.safetensors").write_bytes(BAD_TENSORS[name])
    refused(lambda: CompositionClassifier.load(classifier), classifier / "classifier.safetensors")


def test_a_pickle_is_no_classifier(classifier, tmp_path):
    for name in ("classifier.json", "classifier.safetensors"):
        kept = (classifier / name).read_bytes()
        saved_by_torch(classifier / name, tmp_path / "mark")
        refused(lambda name=name: CompositionClassifier.load(classifier), classifier / name)
        (classifier / name).write_bytes(kept)
    assert CompositionClassifier.load(classifier) and not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"labels": "left"},
        {"labels": ["left"]},
        {"labels": [1, 2]},
        {"labels": ["a"] * 2},
        {"labels": [f"{n}" for n in range(70_000)]},
        {"layers": {}},
        {"layers": ["a"]},
        {"layers": [["a"]] * 7},
        {"heads": [4] * 6},
        {"heads": [0] * 7},
        {"heads": [-1] * 7},
        {"heads": [1.5] * 7},
        {"heads": [2**40] * 7},
        {"heads": [True] * 7},
        {"heads": [60_000] * 7},
        {"grid": [8, 8]},
        {"grid": [8, 8, 8, 8]},
        {"grid": [2**20, 8, 8]},
        {"grid": [60_000] * 3},
        {"timesteps": []},
        {"timesteps": ["now"]},
        {"timesteps": None},
        {"timesteps": [1.0] * 3},
        {"model": {}},
        {"model": {"class": "X", "norms": {"a": [1, "b"]}}},
        {"model": 3},
        {"aggregator": {"width": 10**9}},
        {"aggregator": {"depth": 10**6}},
        {"aggregator": [1]},
        {"aggregator": {"width": 32768}},
        {"aggregator": {"depth": 256}},
        {"aggregator": {"evil": 1}},
        {"aggregator": {"heads": 5}},
        {"aggregator": {"heads": 0}},
        {"backbone": {"kind": "os.system"}},
        {"backbone": {}},
        {"backbone": {"kind": ["x"]}},
        {"backbone": {"kind": "small-video-net", "width": 65536}},
        {"backbone": {"kind": "small-video-net", "dropout": 2}},
        {"backbone": {"kind": "small-video-net", "labels": ["a", "b"]}},
        {"backbone": {"kind": "vision-language", "template": "{0.__class__}"}},
        {"backbone": {"kind": "vision-language", "template": "{:>9999999999}"}},
        {"training": []},
        {"format": "1"},
        {"format": True, "labels": 1},
        {"weights": "0" * 64},
    ],
    ids=str,
)
def test_other_settings_of_a_classifier(settings, classifier):
    """In one line, and in no more memory than the weights have."""
    change(classifier / "classifier.json", **settings)
    with pytest.raises(ArgumentError) as caught:
        CompositionClassifier.load(classifier)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_weights_that_are_no_numbers(classifier):
    path = classifier / "classifier.safetensors"
    weights = {name: one.clone() for name, one in load_file(path).items()}
    weights["backbone.head.bias"][0] = torch.nan
    save_file(weights, path)
    refused(lambda: CompositionClassifier.load(classifier), path, "NaN in 'backbone.head.bias'")


def test_a_classifier_half_saved_is_noticed(classifier, tmp_path):
    """Killed between its two files: settings of the one, weights of the other."""
    made = CompositionClassifier.load(classifier)
    made.save(tmp_path / "one")
    with torch.no_grad():
        made.backbone.head.bias.add_(1)
    made.save(tmp_path / "other")
    assert CompositionClassifier.load(tmp_path / "other")
    shutil.copy(tmp_path / "other/classifier.safetensors", tmp_path / "one")
    refused(lambda: CompositionClassifier.load(tmp_path / "one"), "is of other weights than")


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["../there", "/no/such", "a/b/c", "~/models", "a b", "", ".", "a..b", "-x", "x/-y"])
def test_what_is_no_name_of_the_hub_is_not_asked_for(model, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    if model == ".":
        assert options_for(model)["local_files_only"]
    else:
        refused(lambda: options_for(model), "must be a folder or a name on the hub")
    assert not capsys.readouterr().err


def test_a_file_is_no_model(tmp_path):
    saved_by_torch(tmp_path / "model.ckpt", tmp_path / "mark")
    with pytest.raises(ArgumentError, match="got the file"):
        options_for(tmp_path / "model.ckpt")


def test_the_hub_is_asked_after_it_was_said(monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    said = []

    def from_pretrained(model, **options):
        said.append(capsys.readouterr().err)
        assert options["use_safetensors"] and not options["trust_remote_code"]
        assert not options["local_files_only"]
        raise OSError("no network in tests")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", from_pretrained)
    job = generate.Job("a cat", Path("out"), model="someone/some-model")
    refused(lambda: generate.load_pipeline(job), "'someone/some-model' cannot be loaded", "no network")
    assert len(said) == 1 and said[0].count("\n") == 1
    assert "'someone/some-model' is no folder here: asking https://huggingface.co" in said[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "a cat", "--guidance", "vico", "--words", "cat", "--model", "someone/some-model"],
        ["cvg", "train", "--vision-language", "someone/some-model", "--features", "."],
    ],
)
def test_offline_gives_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "'someone/some-model' cannot be loaded" in said
    assert "neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set" in said


NO_NETWORK = """
import socket
def never(*arguments, **options):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = never
"""


@pytest.mark.drawn(4, of="shipped weights")
def test_what_ships_loads_without_a_network(fresh, tmp_path):
    """Not because it is forbidden: nobody asks."""
    fresh.right(
        f"{NO_NETWORK}import torch\nimport cvg_kernels as cvg\n"
        "pipe = cvg.shapes.load_pipeline()\n"
        "with cvg.CVG().attach(pipe):\n"
        "    pipe('a red circle moving left', num_frames=8, height=64, width=64, num_inference_steps=1)\n",
        tmp_path,
        HF_HUB_OFFLINE=None,
        TRANSFORMERS_OFFLINE=None,
        HOME=str(tmp_path),
        OMP_NUM_THREADS="1",
    )
    assert not (tmp_path / ".cache" / "huggingface" / "hub").exists()
