"""Importing the package loads next to nothing; the reference runs without triton, diffusers and compiled code."""

from __future__ import annotations

import json
import sys

import pytest

import cvg_kernels

HEAVY = ("triton", "diffusers", "transformers", "cvg_kernels._native_cpu", "cvg_kernels._native_cuda")

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


def loaded_by(fresh, code: str, folder) -> set[str]:
    """The modules that code loads where torch is there already, without those of Python itself."""
    said = fresh.right(
        f"import torch, sys, json; before = set(sys.modules)\n{code}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))",
        folder,
        TRITON_INTERPRET="0",
    )
    return {name for name in json.loads(said) if name.partition(".")[0] not in sys.stdlib_module_names}


def test_import_loads_the_package_alone(fresh, tmp_path):
    """What is used is loaded when it is used, so an import costs next to nothing over torch."""
    assert loaded_by(fresh, "import cvg_kernels", tmp_path) == {"cvg_kernels"}


def test_first_use_of_an_operation_loads_operations_only(fresh, tmp_path):
    """No part of torch that a plain `import torch` leaves out, such as its compiler, which takes a second."""
    loaded = loaded_by(fresh, "import cvg_kernels; cvg_kernels.attention_with_capture", tmp_path)
    rooms = {".".join(name.split(".")[:2]) for name in loaded if name.startswith("cvg_kernels.")}
    assert rooms == {
        f"cvg_kernels.{room}"
        for room in (
            "ops",
            "backends",
            "blocks",
            "kernels",
            "auto",
            "errors",
            "native",
            "reading",
            "reference",
            "writing",
            "_layout",
        )
    }
    assert {name.partition(".")[0] for name in loaded} == {"cvg_kernels"}


def test_import_loads_nothing_heavy(fresh, tmp_path):
    loaded = loaded_by(fresh, "import cvg_kernels, cvg_kernels.backends, cvg_kernels.ops", tmp_path)
    assert not loaded & set(HEAVY)


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("blocked", ["triton", "diffusers", "cvg_kernels._native_cpu"])
def test_without_it_the_reference_runs(blocked, fresh, tmp_path):
    fresh.right(f"BLOCKED = {(blocked,)!r}{BLOCK}{REFERENCE}", tmp_path, TRITON_INTERPRET="0")


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(("blocked", "backend"), [("triton", "triton"), ("cvg_kernels._native_cpu", "native")])
def test_without_it_its_backend_says_why(blocked, backend, fresh, tmp_path):
    said = fresh.right(
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


@pytest.mark.drawn(8, of="long tests")
def test_without_diffusers_every_operation_and_capture_is_there(fresh, tmp_path):
    fresh.right(
        f"BLOCKED = ('diffusers', 'transformers'){BLOCK}"
        "import cvg_kernels as cvg\n"
        "for name in cvg.__all__:\n"
        "    if name not in ('shapes', 'viz', 'StructureContentPipeline'): getattr(cvg, name)\n",
        tmp_path,
        TRITON_INTERPRET="0",
    )


def test_every_public_name_is_there():
    for name in cvg_kernels.__all__:
        assert getattr(cvg_kernels, name) is not None, name
    lazy = {*cvg_kernels._HOMES, *cvg_kernels._MODULES, "__version__"}
    assert lazy == set(cvg_kernels.__all__)
    assert sorted(cvg_kernels.__all__) == dir(cvg_kernels)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cvg_kernels.nonsense


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("first", ["", "import cvg_kernels.capturing.capture", "cvg.use_processors"])
def test_capture_is_callable_whatever_was_imported_before(first, fresh, tmp_path):
    fresh.right(
        f"import cvg_kernels as cvg\n{first}\nassert callable(cvg.capture), cvg.capture",
        tmp_path,
        TRITON_INTERPRET="0",
    )


def test_backend_names():
    from cvg_kernels.backends import OPERATIONS, parse_backend

    assert parse_backend("native") is parse_backend(cvg_kernels.Backend.NATIVE)
    with pytest.raises(cvg_kernels.ArgumentError, match="'auto', 'reference', 'stock', 'native', 'triton'"):
        parse_backend("fastest")
    assert all(there[0] is cvg_kernels.Backend.REFERENCE for there in OPERATIONS.values())
