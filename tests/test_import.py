"""Importing the package is quick and needs neither triton, diffusers nor compiled code; the reference runs without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cvg_kernels

HEAVY = (
    "triton",
    "diffusers",
    "transformers",
    "cvg_kernels._native_cpu",
    "cvg_kernels._native_cuda",
)

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in BLOCKED):
            raise ImportError(f"{name} is blocked by this test", name=name)
sys.meta_path.insert(0, Block())
"""

REFERENCE = """
import torch
import cvg_kernels as cvg
torch.manual_seed(0)
q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
out, maps, lse = cvg.attention_with_capture(q, k, v, [1, 4, 1], backend="reference")
p = torch.softmax(q @ k.mT / 8**0.5, -1)
torch.testing.assert_close(out, p @ v)
torch.testing.assert_close(maps, p[..., [1, 4, 1]].mean(1).mT)
torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT / 8**0.5, -1))
cross, hop = torch.rand(1, 2, 4, 6), torch.rand(1, 6, 4, 4)
assert cvg.path_flow(cross, [hop], backend="reference").shape == cross.shape
"""


def fresh(code: str, folder, **environment: str) -> str:
    """Runs code in a new interpreter, in a folder of its own, and returns what it prints."""
    home = str(Path(cvg_kernels.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": home, "TRITON_INTERPRET": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy(tmp_path):
    loaded = fresh(
        "import torch, sys, json; before = set(sys.modules)\n"
        "import cvg_kernels, cvg_kernels.backends, cvg_kernels.ops\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))",
        tmp_path,
    )
    assert not [name for name in json.loads(loaded) if name in HEAVY]


@pytest.mark.parametrize(
    ("used", "allowed"), [("", 0.050), ("; cvg_kernels.attention_with_capture", 0.150)]
)
def test_import_and_first_use_cost_little_over_torch(used, allowed, tmp_path):
    code = (  # the time of the process: other work on the machine does not count
        f"import torch, time; start = time.process_time(); import cvg_kernels{used}\n"
        "print(time.process_time() - start)"
    )
    fresh(code, tmp_path)  # writes the byte code
    seconds = min(float(fresh(code, tmp_path)) for _ in range(5))
    assert seconds <= allowed


@pytest.mark.parametrize("blocked", ["triton", "diffusers", "cvg_kernels._native_cpu"])
def test_without_it_the_reference_runs(blocked, tmp_path):
    fresh(f"BLOCKED = {(blocked,)!r}{BLOCK}{REFERENCE}", tmp_path)


@pytest.mark.parametrize(
    ("blocked", "backend"), [("triton", "triton"), ("cvg_kernels._native_cpu", "native")]
)
def test_without_it_its_backend_says_why(blocked, backend, tmp_path):
    said = fresh(
        f"BLOCKED = {(blocked,)!r}{BLOCK}"
        "import torch, cvg_kernels as cvg\n"
        "q = torch.randn(1, 1, 4, 8)\n"
        f"try: cvg.attention_with_capture(q, q, q, [0], backend={backend!r})\n"
        "except cvg.BackendUnavailableError as error: print(error)\n"
        "automatic = cvg.attention_with_capture(q, q, q, [0])\n"
        "wanted = cvg.attention_with_capture(q, q, q, [0], backend='reference')\n"
        "torch.testing.assert_close(automatic, wanted)\n",
        tmp_path,
        TRITON_INTERPRET="1",
    )
    assert f"backend {backend!r} cannot run attention" in said
    assert "is blocked by this test" in said or "never built" in said or "not found" in said


def test_without_diffusers_every_operation_and_capture_is_there(tmp_path):
    fresh(
        f"BLOCKED = ('diffusers', 'transformers'){BLOCK}"
        "import cvg_kernels as cvg\n"
        "for name in cvg.__all__:\n"
        "    if name not in ('shapes', 'viz'): getattr(cvg, name)\n",
        tmp_path,
    )


def test_every_public_name_is_there():
    for name in cvg_kernels.__all__:
        assert getattr(cvg_kernels, name) is not None, name
    lazy = {*cvg_kernels._HOMES, *cvg_kernels._MODULES, "__version__"}
    assert lazy == set(cvg_kernels.__all__)
    assert sorted(cvg_kernels.__all__) == dir(cvg_kernels)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cvg_kernels.nonsense


@pytest.mark.parametrize(
    "first", ["", "import cvg_kernels.capturing.capture", "cvg.use_processors"]
)
def test_capture_is_callable_whatever_was_imported_before(first, tmp_path):
    fresh(
        f"import cvg_kernels as cvg\n{first}\nassert callable(cvg.capture), cvg.capture", tmp_path
    )


def test_backend_names():
    from cvg_kernels.backends import OPERATIONS, parse_backend

    assert parse_backend("native") is parse_backend(cvg_kernels.Backend.NATIVE)
    with pytest.raises(cvg_kernels.ArgumentError, match="'auto', 'reference', 'native', 'triton'"):
        parse_backend("fastest")
    assert all(there[0] is cvg_kernels.Backend.REFERENCE for there in OPERATIONS.values())
