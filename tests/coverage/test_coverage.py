"""Every tiny pipeline: maps and gradients against eager PyTorch, the swap, a step of each method, what is left behind.

What is found is noted in the table (`docs/coverage.md`) and must be what is committed there: what was right must stay
so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels import native  # noqa: E402
from tests.composition.tiny import tiny_classifier  # noqa: E402
from tests.coverage import gradients, oracle  # noqa: E402
from tests.coverage.facts import OWN_PROCESSORS, UNMOVED, WITHOUT_GRADIENTS, WITHOUT_MAPS  # noqa: E402
from tests.coverage.row import WORDS, Row, answers, same_video  # noqa: E402  # noqa: E402
from tests.coverage.table import LIMITS  # noqa: E402
from tests.pipeline.field import Push  # noqa: E402
from tests.pipelines import PIPELINES  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

rows = pytest.mark.parametrize("row", PIPELINES, indirect=True)


@rows
@pytest.mark.drawn(23)
def test_the_maps_of_words(row, coverage_note):
    """Those of every layer and step of the branch with the prompt; the video is the stock one; nothing stays."""
    name = row.case.name
    coverage_note(name, "pipeline", type(row.pipe).__name__)
    captured = cvg.capture(row.pipe, WORDS)
    try:
        with oracle.watched(row.networks, attention=False) as watch, captured, cvg.trace_backends() as ran:
            video = row.run()
    except cvg.ArgumentError:
        row.restored()
        assert name in WITHOUT_MAPS, "refused without a reason in tests/coverage/facts.py"
        for column, value in {"capture": "no", "why": WITHOUT_MAPS[name]}.items():
            coverage_note(name, column, value)
        return
    assert name not in WITHOUT_MAPS, "works: its reason in tests/coverage/facts.py can go"
    row.restored()
    assert "attention" in {operation for operation, _ in ran}
    same_video(row, video)
    output = answers(row, watch)
    assert output <= LIMITS["output"]

    records = [record for record in captured.records if record.branch == "cond"]
    assert [(record.step, record.layer) for record in records] == [
        (wanted.step, wanted.layer) for wanted in row.wanted
    ]
    error = 0.0
    for record, wanted in zip(records, row.wanted, strict=True):
        assert record.words == tuple(WORDS) and record.maps.shape == (1, 2, *record.grid)
        assert record.grid in row.grids
        error = max(error, float((record.maps[0].flatten(1) - wanted.maps).abs().max()))
    assert error <= LIMITS["capture"]
    for column, value in {"kind": row.kind, "capture": error, "output": output, "why": None}.items():
        coverage_note(name, column, value)


@rows
@pytest.mark.drawn(17)
def test_the_gradient_on_the_latents(row, coverage_note):
    """Of a random loss of the maps of all layers at the first step."""
    name = row.case.name
    if name in WITHOUT_MAPS or name in WITHOUT_GRADIENTS:
        return coverage_note(name, "gradient", "no")
    weights = {layer: torch.randn(maps.shape) for layer, maps in row.seen_maps(row.watch, row.first)}
    found = gradients.ours(row, weights)
    row.restored()
    assert set(found["names"]) == set(weights)
    error = gradients.error(row, weights, found)
    assert error <= LIMITS["gradient"]
    coverage_note(name, "gradient", error)


@rows
@pytest.mark.drawn(10)
def test_the_drop_in_swap(row, coverage_note):
    """The denoiser's answers by our kernels, and by the stock ones again."""
    name = row.case.name
    swap = cvg.processors(row.pipe, backend="reference" if native.reason("cpu") else "native")
    try:
        with oracle.watched(row.networks, attention=False) as watch, cvg.trace_backends() as ran, swap as swapped:
            layers = swapped.layers
            video = row.run()
    except cvg.ArgumentError:
        coverage_note(name, "swap", "no")
        return row.restored()
    row.restored()
    if name in OWN_PROCESSORS:
        assert layers and not ran
        return coverage_note(name, "swap", "no")
    assert layers and ran
    same_video(row, video)
    output = answers(row, watch)
    assert output <= LIMITS["output"]
    coverage_note(name, "swap", output)


METHODS: dict[str, Callable[[Row], Any]] = {
    "vico": lambda row: cvg.Vico(WORDS, step_size=0.1, iterations=1, stop=0.01),
    "cvg": lambda row: cvg.CVG(
        tiny_classifier(row.pipe, range(0, 1001, 250), grid=(2, 3, 3)),
        label=["left", "right"],
        step_size=0.1,
        iterations=1,
        stop=0.01,
    ),
    "vstar": lambda row: cvg.VSTAR(sigma=0.5, strength=4.0, stop=0.01),
    "gen1": lambda row: cvg.Gen1(2.0, stop=0.01),
}


@rows
@pytest.mark.drawn(23)
def test_a_step_of_each_method(row, coverage_note):
    """It is guided, and the video is another one; or the method is refused."""
    name, refused = row.case.name, {}
    for column, method in METHODS.items():
        try:
            with method(row).attach(row.pipe) as run:
                video = row.run()
        except cvg.ArgumentError as error:
            refused[column] = str(error).split(", got ")[0]
        else:
            assert {step for _, step in run.guided} == {0}
            assert video.isfinite().all()
            # rounding alone stays below a thousandth of this
            assert float((video - row.stock).abs().max()) > 1e-4 * float(row.stock.abs().max())
        coverage_note(name, column, "no" if column in refused else "yes")
        row.restored()
    # without maps there is one reason for all
    coverage_note(name, "refused", None if name in WITHOUT_MAPS else refused or None)


@rows
@pytest.mark.drawn(17)
def test_what_stays_after_an_exception(row):
    """In the middle of a captured and guided run; the next run is the stock one to the bit."""

    class Interrupted(Exception):
        pass

    calls = []

    def interrupt(module, args):
        calls.append(module)
        if len(calls) == len(row.watch.calls) // 2 + 1:
            raise Interrupted

    handles = [network.register_forward_pre_hook(interrupt) for network in row.networks]
    with ExitStack() as opened:
        for handle in handles:
            opened.callback(handle.remove)
        if row.case.name.startswith("animatediff_pag") or row.case.name in OWN_PROCESSORS:
            opened.enter_context(oracle.processors_kept(row.networks))
        opened.enter_context(pytest.raises(Interrupted))
        if row.case.name not in WITHOUT_MAPS:
            if row.case.name not in UNMOVED:
                opened.enter_context(Push(0.1).attach(row.pipe))
            opened.enter_context(cvg.capture(row.pipe, WORDS))
        row.run()
    row.restored()
    assert torch.equal(row.run(), row.stock)
