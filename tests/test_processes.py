"""Which of several processes this one is; and clips that several share are those of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvg_kernels.errors import ArgumentError
from cvg_kernels.processes import Place, gather

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, Place(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3"}, Place(3, 4, 3)),
        # a batch script is one process, however many tasks its steps will have
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Place(0, 1, 0)),
        # torchrun in a SLURM step
        (
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_LOCALID": "0",
            },
            Place(1, 2, 1),
        ),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Place(0, 1, 0)),
    ],
)
def test_places(environment, place):
    assert Place.of_this_process(environment) == place


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Place(0, 1, 0).device("cuda") == "cuda"
    assert Place(3, 4, 1).device("cuda") == "cuda:1"
    assert Place(3, 4, 1).device("cuda:0") == "cuda:0" and Place(3, 4, 1).device("cpu") == "cpu"
    with pytest.raises(ArgumentError, match="a GPU for each process, got 2 GPUs for process 2"):
        Place(2, 4, 2).device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as --gpus-per-task=1 shows it
    assert Place(3, 4, 3).device("cuda") == "cuda:0"


def test_a_process_alone_gathers_from_itself(monkeypatch):
    assert gather("mine", Place()) == ["mine"]
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ArgumentError, match="must be started by torchrun or accelerate launch"):
        gather("mine", Place(0, 2, 0))


@pytest.mark.drawn(44, of="two processes")
@pytest.mark.usefixtures("one_thread")  # as theirs, so that no verdict hangs on the rounding
def test_two_processes_score_as_one(tmp_path):
    """Under `accelerate launch`; two batches of clips, of which each process makes one."""
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    from cvg_kernels.shapes.evaluation import evaluate
    from cvg_kernels.shapes.pipeline import load_pipeline

    path = tmp_path / "report.json"
    # multi_gpu is how it starts several processes, also where there is no GPU
    command = (
        "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        "--mixed_precision no --dynamo_backend no -m cvg_kernels"
    )
    asked = f"shapes eval --guidance none --prompts 12 --steps 1 --json {path}"
    done = subprocess.run(
        [sys.executable, *command.split(), *asked.split()],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 two-object prompts") == 1  # one of them prints
    shared = json.loads(path.read_text())
    alone = evaluate(load_pipeline(), {"none": None}, model="shapes (shipped)", prompts=12, seed=0, steps=1)
    assert (shared.pop("processes"), alone.pop("processes")) == (2, 1)
    for report in (alone, shared):
        assert report["guidance"]["none"].pop("seconds_per_clip") > 0
    assert _close(shared, json.loads(json.dumps(alone)))


def _close(one, other) -> bool:
    """Equal up to rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_close, one, other))
    return one == pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(one, float) else one == other
