"""cvg_kernels.bench: layouts of layers, what is timed, and that a wrong result is not."""

from __future__ import annotations

import json

import pytest
import torch

from cvg_kernels.bench import attention, frame_band_attention, host_cost, temporal_attention
from cvg_kernels.bench.harness import (
    OURS,
    arms_by_backend,
    as_layers_have_it,
    as_layers_take_it,
    graphed_where_possible,
    median_seconds,
)
from cvg_kernels.cli import main

CPU = torch.device("cpu")


def test_the_layout_of_layers():
    """Diffusers' processors view [B, N, H·D] as heads, and give [B, N, H·D] back."""
    query = as_layers_have_it(2, 3, 5, 4, CPU, torch.bfloat16)
    assert query.shape == (2, 3, 5, 4) and query.dtype == torch.bfloat16
    assert query.transpose(1, 2).is_contiguous() and not query.is_contiguous()
    taken = as_layers_take_it(query)
    assert taken.shape == (2, 5, 12) and taken.data_ptr() == query.data_ptr()
    copied = as_layers_take_it(query.contiguous())
    assert torch.equal(copied, taken) and copied.is_contiguous()


@pytest.mark.parametrize("operation", ["attention", "temporal_attention", "temporal_maps", "frame_band_attention"])
@pytest.mark.drawn(8, of="long tests")
def test_quick_benchmarks(operation, tmp_path, capsys, one_thread):
    """Every arm runs, and agrees; ours is there by every backend that runs here."""
    path = tmp_path / "figures.json"
    assert main(["bench", operation, "--quick", "--rounds", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    ours = list(arms_by_backend(operation, lambda backend: backend, CPU, torch.float32))
    for layer in report["layers"]:
        assert list(layer["forward"])[-len(ours) :] == ours
        for kind in ("forward", "forward_backward"):
            assert all(isinstance(took, float) for took in layer[kind].values()), layer[kind]
        assert "forward_graph" not in layer
    said = capsys.readouterr().out
    assert all(arm in said for arm in ours)


@pytest.mark.drawn(8, of="long tests")
def test_attention_against_every_stock_backend(capsys, one_thread):
    floors = attention.floors_for(CPU)
    assert list(floors) == ["sdpa alone", "sdpa flash", "sdpa math"]
    figures = attention.measure(attention.QUICK_SHAPES[0], CPU, torch.float32, rounds=1)
    attention.show(figures, {"matrix_product_flops": 1e9})
    said = capsys.readouterr().out
    assert "forward: ×" in said and "forward backward: ×" in said


@pytest.mark.parametrize("bench", [attention, temporal_attention, frame_band_attention])
def test_a_wrong_result_is_not_timed(bench, monkeypatch, one_thread):
    right = bench.eager

    def wrong(*inputs):
        out, *rest = right(*inputs)
        return (out + 0.1 * out.abs().max(), *rest)

    if bench is attention:
        monkeypatch.setattr(bench, "eager", wrong)
    else:
        monkeypatch.setitem(bench.RIVALS, next(n for n in bench.RIVALS if "eager" in n), wrong)
    with pytest.raises(AssertionError, match="eager.* differs by"):
        bench.measure(bench.QUICK_SHAPES[0], CPU, torch.float32, rounds=1)


def test_an_arm_that_fails_has_its_error():
    def fails():
        raise RuntimeError("out of memory\nand more")

    times = median_seconds({"bad": fails, OURS: lambda: None}, CPU, rounds=1)
    assert times["bad"] == "RuntimeError: out of memory" and times[OURS] >= 0


def test_python_cost_is_told_as_a_multiple(capsys, monkeypatch, one_thread):
    """A clock that a call of stock's moves by 1 and one of ours by 3, forward and backward alike."""
    clock = [0.0]
    monkeypatch.setattr(host_cost.time, "process_time", lambda: clock[0])

    def arm(ticks):
        def call(query):
            clock[0] += ticks
            return query * 2

        return call

    cost = host_cost.python_cost(arm(3.0), arm(1.0), (torch.randn(4),), CPU, rounds=3)
    kinds = ["forward", "forward with gradients", "forward + backward"]
    assert list(cost) == kinds
    assert all(cost[kind] == {"ours": 3.0, "stock": 1.0, "ratio": 3.0} for kind in kinds)
    host_cost.show(cost)
    assert "Python cost per call, forward: ours ×3.0 of stock's" in capsys.readouterr().out


def test_the_benchmark_of_attention_tells_its_python_cost(capsys, one_thread):
    cost = attention.once(CPU, torch.float32, rounds=1)["python_cost"]
    assert all(figures["ratio"] > 0 for figures in cost.values())
    assert capsys.readouterr().out.count("Python cost per call") == 3


@pytest.mark.gpu
def test_cuda_graphs_of_arms():
    """A replay computes anew; an arm that waits for the GPU cannot be captured, and says so where it is timed."""
    number = torch.ones(1000, device="cuda")
    arms = {"double": lambda: (number * 2,), "waits": lambda: number.sum().item()}
    replays = graphed_where_possible(arms)
    number.fill_(3)
    (found,) = replays["double"]()
    assert torch.equal(found, torch.full_like(found, 6))
    times = median_seconds(replays, torch.device("cuda"), rounds=2)
    assert times["double"] > 0 and "Error" in times["waits"]
    assert torch.equal(number * 2, found)  # a failed capture leaves the device usable
