"""Checkpoints and training sets: each may come from anywhere, or be half of one."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from cvg_kernels.shapes.latents import read_shards  # noqa: E402
from cvg_kernels.training.checkpoint import Checkpoint  # noqa: E402
from cvg_kernels.training.store import Examples, load, write_index, write_or_check_settings, write_shard  # noqa: E402
from tests.trust.files import BAD_JSON, BAD_TENSORS, refused, saved_by_torch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Training:
    """A network on its way."""

    def __init__(self, path, width=3) -> None:
        self.model = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.model[2].bias = nn.Parameter(self.model[2].bias.detach().bfloat16().float())
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=50)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.checkpoint = Checkpoint(path, **{k: v for k, v in vars(self).items() if k != "path"})

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.model(x).square().sum().backward()
            self.optimizer.step()
            self.schedule.step()
            self.average.update_parameters(self.model)


def same(one, other) -> bool:
    """Equal to the bit, and of the same kinds."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def test_a_resumed_training_is_the_same_to_the_bit(tmp_path):
    whole = Training(tmp_path / "a.safetensors")
    other = Training(tmp_path / "b.safetensors")
    other.model.load_state_dict(whole.model.state_dict())
    whole.average.module.load_state_dict(whole.model.state_dict())
    other.average.module.load_state_dict(whole.model.state_dict())
    cut = random.randint(1, 9)
    whole.steps(0, 10)
    other.steps(0, cut)
    other.checkpoint.save(cut)
    again = Training(tmp_path / "b.safetensors")
    assert again.checkpoint.resume() == cut
    again.steps(cut, 10)
    for part in ("model", "optimizer", "schedule", "average"):
        states = (getattr(one, part).state_dict() for one in (whole, again))
        assert same(*map(dict, states)), part
    assert list(tmp_path.iterdir()) == [tmp_path / "b.safetensors"]


class Anything:
    def __init__(self, state) -> None:
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state) -> None:
        self.state = state


def test_every_plain_state_comes_back(tmp_path):
    both = torch.randn(4, 6)
    state = {
        0: (1, [2.5, None, True], {"tuple": (1,), "dict": {3: "x"}, "tensor": "0"}),
        "é\n": random.random(),
        "odd": [float("inf"), float("-inf"), float("nan"), -0.0, 5e-324],
        "none": {},
        True: (),
        "shared": [both, both.mT, both[1:3, ::2]],
        "types": [torch.tensor(3), torch.tensor([], dtype=torch.int8)],
        "half": torch.randn(3).bfloat16(),
        "flag": torch.tensor([True, False]),
    }
    Checkpoint(tmp_path / "c.safetensors", it=Anything(state)).save(7)
    found = Anything(None)
    assert Checkpoint(tmp_path / "c.safetensors", it=found).resume() == 7
    assert same(found.state, state)


def test_what_no_checkpoint_holds_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="tensors and plain values, got object"):
        Checkpoint(tmp_path / "c.safetensors", it=Anything({"a": object()})).save(1)
    assert not list(tmp_path.iterdir())


def test_an_older_pickled_checkpoint_is_named_and_not_run(tmp_path):
    saved_by_torch(tmp_path / "model.pt", tmp_path / "mark")
    checkpoint = Checkpoint(tmp_path / "model.safetensors", model=nn.Linear(2, 2))
    refused(checkpoint.resume, tmp_path / "model.pt", "delete it")
    saved_by_torch(tmp_path / "model.safetensors", tmp_path / "mark")
    refused(checkpoint.resume, tmp_path / "model.safetensors", "must be a safetensors file")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_file_that_is_no_checkpoint(name, tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(BAD_TENSORS[name])
    refused(Checkpoint(path, model=nn.Linear(2, 2)).resume, path)


@pytest.mark.parametrize(
    "tree",
    [
        "",
        "[",
        "3",
        "null",
        "[]",
        "{}",
        '{"dict": 3}',
        '{"dict": [["step", 1]]}',
        '{"dict": [[{}, 1]]}',
        '{"dict": [["step", "x"], ["model", 1]]}',
        '{"dict": [["step", 1], ["model", {"tensor": "9"}]]}',
        '{"dict": [["step", 1], ["model", {"evil": 1}]]}',
        '{"dict": [["step", 1], ["model", 5]]}',
        '{"dict": [["step", 1], ["model", {"dict": []}]]}',
        '{"dict": [["step", 1], ["model", {"float": 1}]]}',
        '{"dict": [["step", 1], ["model", {"dict": [["weight", {"tensor": "0"}]]}]]}',
        '{"dict": [["step", NaN], ["model", 1]]}',
        "[" * 3000 + "]" * 3000,
        '{"tuple":' * 400 + "1" + "}" * 400,
    ],
)
def test_a_state_that_is_none(tree, tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"0": torch.ones(5)}, path, metadata={"format": "1", "state": tree})
    refused(Checkpoint(path, model=nn.Linear(2, 2)).resume, path)


def test_the_checkpoint_of_another_network(tmp_path):
    Training(tmp_path / "a.safetensors", width=5).checkpoint.save(1)
    refused(Training(tmp_path / "a.safetensors").checkpoint.resume, tmp_path, "another model")
    refused(Checkpoint(tmp_path / "a.safetensors", model=nn.Linear(2, 2)).resume, "of model, got one")


# --- training sets ---------------------------------------------------------------------------------------------------

INDEX = {
    "labels": ["left", "right"],
    "timesteps": [999.0, 949.0],
    "layers": ["a", "b"],
    "heads": [1, 2],
    "grid": [2, 3, 4],
    "fingerprint": {"class": "None", "norms": {}},
    "recipe": {},
}


@pytest.fixture
def features(tmp_path):
    folder = tmp_path / "features"
    write_index(folder, INDEX)
    for first in (0, 5):
        label = torch.randint(-1, 2, (5, 2), dtype=torch.int8)
        maps = torch.rand(5, 2, 2, 3, 2, 3, 4).half()
        examples = Examples(maps, label, label.clone(), torch.zeros(5, dtype=torch.uint8), torch.arange(5))
        write_shard(folder / f"{first:06d}.safetensors", examples)
    return folder


def test_good_features_are_read(features):
    index, examples = load(features)
    assert len(examples) == 10 and index["labels"] == INDEX["labels"]


@pytest.mark.parametrize("name", BAD_JSON)
def test_an_index_that_is_none(name, features):
    (features / "index.json").write_bytes(BAD_JSON[name][0])
    refused(lambda: load(features), features / "index.json")
    refused(lambda: write_or_check_settings(features / "index.json", {"format": 2}), features)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"labels": []},
        {"labels": "left"},
        {"labels": [1, 2]},
        {"layers": ["a"]},
        {"heads": [1, 0]},
        {"heads": [1.0, 2]},
        {"grid": [2, 3]},
        {"grid": [2, 3, -4]},
        {"grid": [2, 3, 2**60]},
        {"timesteps": []},
        {"timesteps": ["a", "b"]},
        {"timesteps": [1.0]},
        {"fingerprint": 1},
        {"labels": ["one"]},
        {"heads": [1, True]},
    ],
    ids=str,
)
def test_an_index_of_other_features(change, features):
    path = features / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(lambda: load(features), features)


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_shard_that_is_none(name, features):
    (features / "000005.safetensors").write_bytes(BAD_TENSORS[name])
    refused(lambda: load(features), features / "000005.safetensors")
    refused(lambda: read_shards(features, INDEX), features)


@pytest.mark.parametrize("spoiled", ["lacks", "more", "dtype", "shape", "rows", "NaN", "label", "asked"])
def test_a_shard_of_other_features(spoiled, features):
    path = features / "000005.safetensors"
    found = {name: one.clone() for name, one in load_file(path).items()}
    if spoiled == "lacks":
        del found["asked"]
    elif spoiled == "more":
        found["evil"] = torch.ones(5)
    elif spoiled == "dtype":
        found["maps"] = found["maps"].float()
    elif spoiled == "shape":
        found["maps"] = found["maps"][:, :, :, :, :, :, 1:].contiguous()
    elif spoiled == "rows":
        found["clip"] = found["clip"][1:].clone()
    elif spoiled == "NaN":
        found["maps"][2, 1] = torch.nan
    else:
        found[spoiled][1, 1] = 2
    save_file(found, path)
    refused(lambda: load(features), path)


def test_shards_fit_each_other(tmp_path):
    names = ("a", "b")
    refused(lambda: read_shards(tmp_path, names), "got none")
    save_file({"a": torch.ones(3, 2), "b": torch.ones(3)}, tmp_path / "0.safetensors")
    assert read_shards(tmp_path, names)["a"].shape == (3, 2)
    for other in (
        {"a": torch.ones(3, 3), "b": torch.ones(3)},
        {"a": torch.ones(3, 2), "b": torch.ones(2)},
        {"a": torch.ones(3, 2).half(), "b": torch.ones(3)},
        {"a": torch.ones(3, 2)},
    ):
        save_file(other, tmp_path / "1.safetensors")
        refused(lambda: read_shards(tmp_path, names), tmp_path / "1.safetensors")
