"""The C++ kernels: every instruction-set level, any number of threads, and memory safety."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import cvg_kernels as cvg
from cvg_kernels import native

pytestmark = pytest.mark.skipif(native.reason("cpu") is not None, reason=str(native.reason("cpu")))

_LEVEL_CHECK = """
import torch, cvg_kernels as cvg
from cvg_kernels import native
from python_ref import attention as reference
assert native.load("cpu").isa() == {level!r}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for keys in (21, 700):
        q = torch.randn(2, 2, 37, 20).to(dtype).requires_grad_()
        k = torch.randn(2, 2, keys, 20).to(dtype).requires_grad_()
        v = torch.randn(2, 2, keys, 12).to(dtype).requires_grad_()
        exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
        ids = torch.tensor([[3, 3, 20]] * 2)
        mine = cvg.attention_with_capture(q, k, v, ids, backend="native")
        want = reference.attention_with_capture(*exact, ids, scale=20**-0.5)
        tolerance = {{torch.float64: 1e-12, torch.float32: 2e-5}}.get(dtype, 3e-2)
        cotangents = [torch.randn_like(t) for t in mine]
        grads = torch.autograd.grad(mine, (q, k, v), cotangents)
        wanted = torch.autograd.grad(want, exact, [c.double() for c in cotangents])
        for found, right in zip((*mine, *grads), (*want, *wanted)):
            error = ((found.double() - right).abs().max() / right.abs().max()).item()
            assert error < tolerance, (dtype, keys, error)
"""


@pytest.mark.parametrize(
    "level", native.load("cpu").levels() if native.reason("cpu") is None else []
)
def test_every_level_of_this_machine(level):
    subprocess.run(
        [sys.executable, "-c", _LEVEL_CHECK.format(level=level)],
        env=os.environ | {"CVG_CPU_ISA": level},
        check=True,
    )


@pytest.mark.parametrize("level", ["avx9", "AVX2"])
@pytest.mark.parametrize(
    "call",
    [
        "from cvg_kernels.cli import main; raise SystemExit(main(['info']))",
        "import torch, cvg_kernels as cvg; q = torch.ones(1, 1, 2, 4)\n"
        "try: cvg.attention_with_capture(q, q, q, [0])\n"  # `auto` does without no kernel in silence
        "except cvg.ArgumentError as error: raise SystemExit(f'cvg-kernels info: {error}')",
    ],
    ids=["info", "auto"],
)
def test_an_unknown_level_is_refused(level, call):
    ran = subprocess.run(
        [sys.executable, "-c", call],
        env=os.environ | {"CVG_CPU_ISA": level},
        capture_output=True,
        text=True,
    )
    assert ran.returncode != 0
    there = ", ".join(native.load("cpu").levels())
    assert ran.stderr.strip().splitlines()[-1] == (
        "cvg-kernels info: CVG_CPU_ISA must be one of what this machine can run "
        f"({there}), got '{level}'"
    )


@pytest.mark.parametrize("level", ["", "baseline"])
def test_info_names_the_level_and_what_caps_it(level):
    ran = subprocess.run(
        [sys.executable, "-m", "cvg_kernels", "info"],
        env=os.environ | {"CVG_CPU_ISA": level},
        capture_output=True,
        text=True,
        check=True,
    )
    best = native.load("cpu").levels()[-1]
    shown = f"baseline (CVG_CPU_ISA; this machine can run {best})" if level else best
    assert f"yes: {shown}, built by" in ran.stdout


def test_threads_do_not_change_a_bit():
    inputs = [torch.randn(2, 3, n, 24, requires_grad=True) for n in (300, 640, 640)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found = cvg.attention_with_capture(*inputs, [5, 639], backend="native")
            grads = torch.autograd.grad(found, inputs, [torch.randn_like(t) for t in found])
            results.append((*found, *grads))
    finally:
        torch.set_num_threads(before)
    # Tiles depend on the number of threads, and with them nothing but which thread works where: sums keep their order.
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_many_short_sequences():
    """More batch entries than a GPU grid's 65 535, as temporal attention has."""
    query, key, value = torch.randn(3, 70_000, 1, 3, 4).unbind(0)
    with cvg.trace_backends() as ran:
        found = cvg.attention_with_capture(query, key, value, [0, 1, 2])
    assert ran == [("attention", "native")]
    weights = (query @ key.mT / 2).softmax(-1)
    torch.testing.assert_close(found.out, weights @ value)
    torch.testing.assert_close(found.maps, weights[:, 0].mT)


def test_ids_are_checked_before_memory_is_read():
    """Where the public check cannot look (in a compiled graph), the kernel's own check stands."""
    query, key, value = torch.randn(3, 1, 1, 4, 8).unbind(0)
    ids = torch.tensor([[4]])
    with pytest.raises(IndexError, match=r"token_ids must lie in \[0, 4\), got 4"):
        torch.ops.cvg_kernels.attention_forward(query, key, value, ids, None, 0.3, True, "native")
