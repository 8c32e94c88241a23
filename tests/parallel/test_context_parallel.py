"""One video on two processes under diffusers' context parallelism: what one process alone gives, or a refusal."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels.guidance.base import Guidance  # noqa: E402
from tests.pipelines import PIPELINES, run  # noqa: E402

CASES = pytest.importorskip("tests.parallel.worker").CASES
ROOT = Path(__file__).parents[2]
#: Sums over tokens and heads in another order, float32: diffusers alone differs by 3e-7.
ROUNDING = 1e-5
#: Vico's token softmax is a hundred times as sharp, and its steps are of a given length whatever the gradient's.
MAGNIFIED = 100 * ROUNDING


@pytest.fixture(scope="module")
def found(request, tmp_path_factory) -> list[dict]:
    """What each of two processes found of the cases that tests of this run ask for."""
    asked: set[str] = set()
    for item in request.session.items:
        if getattr(item, "function", None) is test_both_processes_have_what_one_gives:
            asked.add("-".join(item.callspec.params[part] for part in ("name", "form", "way")))
        elif getattr(item, "function", None) is test_the_table_of_coverage_has_the_forms_that_are_right:
            asked |= {"-".join(case) for case in CASES if case[2] == "capture"}
    folder, seed = tmp_path_factory.mktemp("parallel"), str(secrets.randbelow(2**31))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.parallel.worker"]
    each = [
        subprocess.Popen(
            [*command, str(rank), str(folder), seed, *sorted(asked)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=500)[0] for process in each]
    finally:
        for process in each:
            process.kill()
    assert [process.returncode for process in each] == [0, 0], f"seed {seed}\n{printed}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _refused(name: str, form: str, way: str) -> str | None:
    """What must be refused, and why."""
    if name == "helios":
        return "gathers its sequence at 6 places"
    if name == "ltx" and form == "ring":
        return "by a ring of 2 processes, each with a share of the keys"
    if name == "ltx" and way == "vico":
        return "maps and bands have no gradient there"
    if form.endswith("anything") and way == "vico":
        return f"with {form}, which diffusers cannot differentiate"
    if form == "ring" and "vstar" in way:
        return "by a ring of 2 processes, each with a share of the keys"
    if way == "vico_and_vstar":
        return "maps and bands have no gradient there"
    return None


@pytest.mark.drawn(44, of="two processes")
@pytest.mark.parametrize("name, form, way", CASES)
def test_both_processes_have_what_one_gives(name, form, way, found):
    """Whole maps, the frames, and for Vico every loss and gradient norm, in both processes."""
    reason = _refused(name, form, way)
    for each in found:
        case = each[f"{name}-{form}-{way}"]
        assert "failed" not in case, case["failed"]
        if reason is not None:
            assert reason in case["refused"]
            continue
        assert case["share"][0] == case["share"][1] > 0  # each process had half of the queries
        assert case["count"] >= {"capture": 13, "vico": 13, "gradients": 7}.get(way, 1)
        assert case["error"] < (MAGNIFIED if way == "vico" else ROUNDING)


@pytest.mark.drawn(44, of="two processes")
def test_the_table_of_coverage_has_the_forms_that_are_right(found, coverage_note):
    right: dict[str, list[str]] = {}
    for name, form, way in CASES:
        if way == "capture" and _refused(name, form, way) is None:
            assert all(each[f"{name}-{form}-{way}"]["error"] < ROUNDING for each in found)
            right.setdefault(name, []).append(form.replace("_", " "))
    for name, forms in right.items():
        coverage_note(name, "context_parallel", ", ".join(forms))


@pytest.mark.drawn(8, of="long tests")
def test_shares_of_maps_are_put_together(found):
    """Uneven shares of the queries and shares of the heads, with the gradient of a loss that both compute."""
    for each in found:
        assert set(each["shares"]) == {"queries", "queries_mean", "heads", "heads_mean"}
        assert max(each["shares"].values()) < 1e-14


def test_vico_moves_the_video():
    """By more than what is allowed to differ above."""
    pipe, options = PIPELINES["wan"].build()
    stock = run(pipe, options)
    with cvg.Vico(words=["cat", "blue dog"], iterations=2, stop=1.0, flow="cross").attach(pipe):
        moved = run(pipe, options)
    assert (moved - stock).abs().max() > 10 * MAGNIFIED * stock.abs().max()


def _parallel(network, **options):
    config = diffusers.ContextParallelConfig(**{"ulysses_degree": 2, **options})
    network._parallel_config = diffusers.ParallelConfig(context_parallel_config=config)


def test_tokens_that_are_not_in_order_are_refused():
    """Text and video in one sequence, and frames in the batch: only a plan of the user's own spreads these."""
    for name, message in (("cogvideox", "in one sequence"), ("latte", "frame by frame")):
        pipe, _ = PIPELINES[name].build()
        _parallel(pipe.transformer)
        for attach in (cvg.capture(pipe, words=["cat"]).__enter__, lambda p=pipe: _vico(p)):
            with pytest.raises(cvg.ArgumentError, match=message):
                attach()


def _vico(pipe):
    return cvg.Vico(words=["cat"]).attach(pipe)


def test_tensor_parallelism_is_refused_for_maps():
    pipe, _ = PIPELINES["wan"].build()
    config = diffusers.TensorParallelConfig(tp_degree=2)
    pipe.transformer._parallel_config = diffusers.ParallelConfig(tensor_parallel_config=config)
    for attach in (cvg.capture(pipe, words=["cat"]).__enter__, lambda: _vico(pipe)):
        with pytest.raises(cvg.ArgumentError, match="under tensor parallelism"):
            attach()
    cvg.use_processors(pipe).restore()


class _Through(Guidance):
    def before_step(self, call, run):
        z = call.latents.detach().requires_grad_()
        return torch.autograd.grad(call.denoise(z)[0].sum(), z)[0]


def test_gradients_through_several_gathers_are_refused():
    """As Helios' own plan has them, at every layer; also for methods that differentiate by themselves."""
    from diffusers.hooks.context_parallel import ContextParallelGatherHook
    from diffusers.hooks.hooks import HookRegistry

    class Deaf(ContextParallelGatherHook):
        def post_forward(self, module, output):
            return output

    Deaf.__name__ = ContextParallelGatherHook.__name__
    pipe, options = PIPELINES["wan"].build()
    _parallel(pipe.transformer)
    for block in pipe.transformer.blocks:
        HookRegistry.check_if_exists_or_initialize(block.attn2).register_hook(Deaf([], None), "cp")
    with pytest.raises(cvg.ArgumentError, match="gathers its sequence at 2 places"):
        _vico(pipe)
    with pytest.raises(cvg.ArgumentError, match="gathers its sequence at 2 places"), _Through().attach(pipe):
        run(pipe, options)
