"""The table of kernels, the choice by it, and what happens to a kernel that fails under `auto`."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import cvg_kernels as cvg
from cvg_kernels import auto
from cvg_kernels.backends import OPERATIONS
from cvg_kernels.kernels import KERNELS, TRITON_BACKENDS, Backend, Facts, kernels_of
from cvg_kernels.ops import _choice
from cvg_kernels.ops._choice import kernel_for, run_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
#: What a module of each operation must have.
FUNCTIONS = {
    "attention": ("forward", "backward", "capture"),
    "attention_backward": ("forward", "backward", "capture"),
    "frame_band_attention": ("forward", "backward"),
    "temporal_attention": ("forward", "backward"),
    "temporal_maps": ("forward", "backward"),
    "path_flow": ("forward", "backward"),
    "min_max_matmul": ("forward", "backward"),
    "token_peaks": ("forward", "backward"),
    "max_flow": ("subgraph_forward", "subgraph_backward", "forward"),
    "coupled_max_flow": ("forward",),
    "guidance_mix": ("forward",),
    "depth_structure": ("depth_structure",),
}
LINES = [(operation, backend) for operation, there in KERNELS.items() for backend in there]


@pytest.fixture
def everything_runs(monkeypatch):
    """As on a machine where every backend is there."""
    monkeypatch.setattr(_choice, "unavailable_reason", lambda *call: None)


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "backend"), LINES)
def test_every_line_names_a_module_with_its_functions(operation, backend):
    if backend in TRITON_BACKENDS:
        pytest.importorskip("triton")
    kernel = KERNELS[operation][backend]
    module = importlib.import_module(kernel.module)
    for name in FUNCTIONS[operation]:
        assert callable(getattr(module, name)), f"{kernel.module} has no {name}"
    assert not kernel.asks or callable(module.reason)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in kernel.dtypes)


def test_every_operation_has_a_reference_that_takes_everything():
    for operation, there in KERNELS.items():
        kernel = there[Backend.REFERENCE]
        assert not (kernel.devices or kernel.dtypes or kernel.limits), operation
    assert set(OPERATIONS) == {name for name in KERNELS if not name.endswith("_backward")}


@pytest.mark.parametrize(
    ("operation", "backend", "given", "refused"),
    [
        ("temporal_attention", "cuda", {"frames": 15, "head_dim": 8, "value_dim": 8}, "frames 15"),
        ("temporal_attention", "cuda", {"frames": 16, "head_dim": 8, "value_dim": 161}, "of value 161"),
        ("temporal_attention", "triton", {"frames": 33, "head_dim": 8, "value_dim": 8}, "frames 33"),
        ("temporal_maps", "triton", {"frames": 33, "head_dim": 8}, "frames 33"),
        ("temporal_maps", "triton", {"frames": 8, "head_dim": 136}, "head_dim 136"),
        ("max_flow", "cuda", {"frames": 65}, "frames .or nodes. 65"),
        ("guidance_mix", "triton", {"predictions": 5}, "predictions 5"),
        ("guidance_mix", "triton", {"predictions": 3, "rescale": True}, "a rescale"),
        ("attention", "stock", {"head_dim": 8, "value_dim": 8, "key_bias": True}, "a key mask"),
        ("attention", "stock", {"head_dim": 8, "value_dim": 8, "token_bias": True}, "a bias on tokens"),
        ("attention", "stock", {"head_dim": 8, "value_dim": 8, "band": True}, "a band"),
        ("attention", "stock", {"head_dim": 8}, "no values"),
        ("attention", "stock", {"head_dim": 8, "value_dim": 16}, "head_dim 8 and 16 of value"),
        ("attention", "stock", {"head_dim": 12, "value_dim": 12}, "head_dim 12 on a GPU"),
        ("attention_backward", "stock", {"head_dim": 8, "value_dim": 8, "deterministic": True}, "determin"),
    ],
)
def test_limits_speak(operation, backend, given, refused, everything_runs):
    dtype = torch.float16 if backend == "cuda" and operation != "max_flow" else torch.float32
    facts = Facts(CUDA, dtype, **given)
    with pytest.raises(cvg.ArgumentError, match=refused) as raised:
        kernel_for(operation, backend, facts)
    assert f"is not supported by backend '{backend}'; it takes" in str(raised.value)
    assert kernel_for(operation, "auto", facts).backend.value != backend


def test_dtypes_are_refused_by_name(everything_runs):
    with pytest.raises(cvg.ArgumentError, match="float64 is not supported by backend 'triton'; it takes float32, bf"):
        kernel_for("attention", "triton", Facts(CUDA, torch.float64))


def test_torchs_sums_may_come_in_any_order_on_the_cpu_never():
    facts = Facts(CPU, torch.float32, head_dim=8, value_dim=8, deterministic=True)
    assert KERNELS["attention_backward"][Backend.STOCK].refusal(facts) is None


# --- auto ------------------------------------------------------------------------------------------------------------


def test_the_shipped_table_decides_for_every_operation():
    for name in ("any cpu", "any gpu"):
        rules = auto.shipped().rules[name]
        always = {rule.operation for rule in rules if not rule.when}
        assert always == set(KERNELS), name
        for rule in rules:
            assert all(backend in kernels_of(rule.operation) for backend in rule.order)


@pytest.mark.parametrize(
    ("operation", "dtype", "given", "chosen"),
    [
        ("attention", torch.bfloat16, {"keys": 1025}, "stock"),
        ("attention", torch.bfloat16, {"keys": 1024}, "triton"),
        ("attention", torch.float32, {"keys": 1025}, "triton"),
        ("attention", torch.bfloat16, {"keys": 1025, "key_bias": True}, "triton"),
        ("attention_backward", torch.bfloat16, {"need_query": True, "grad_out": True}, "stock"),
        ("attention_backward", torch.bfloat16, {"need_query": True, "grad_maps": True}, "triton"),
        ("attention_backward", torch.bfloat16, {"need_key": True, "grad_lse": True}, "stock"),
        ("attention_backward", torch.bfloat16, {"grad_out": True, "deterministic": True}, "triton"),
        ("frame_band_attention", torch.bfloat16, {"keys": 1025, "band": True}, "triton"),
        ("temporal_attention", torch.float16, {"frames": 16}, "triton"),
        ("temporal_attention_backward", torch.float16, {"frames": 129}, "reference"),
        ("max_flow_backward", torch.float32, {"frames": 8}, "cuda"),
        ("coupled_max_flow", torch.float64, {}, "reference"),
    ],
)
def test_what_auto_is_on_a_gpu(operation, dtype, given, chosen, everything_runs):
    facts = Facts(CUDA, dtype, head_dim=64, value_dim=64, **given)
    assert kernel_for(operation, "auto", facts).backend.value == chosen


def test_a_device_without_kernels_gets_the_reference(everything_runs):
    facts = Facts(torch.device("mps"), torch.float32, keys=16)
    for operation in KERNELS:
        assert kernel_for(operation, "auto", facts).backend is Backend.REFERENCE


# --- a kernel that fails ---------------------------------------------------------------------------------------------


class CompilationError(Exception):
    """As Triton's: derived from nothing but `Exception`."""


FACTS = Facts(CUDA, torch.bfloat16, keys=2000, head_dim=64, value_dim=64)


def failing(error: Exception, calls: list):
    """A call that fails with one backend and gives the name of the others."""

    def call(module):
        calls.append(module.__name__.rpartition(".")[2])
        if calls[-1] == "_attention_stock":
            raise error
        return calls[-1]

    return call


@pytest.mark.parametrize(
    "error", [CompilationError("at 3:7: no such thing"), RuntimeError("Triton Error [CUDA]: invalid argument")]
)
def test_under_auto_the_next_kernel_takes_over_with_one_warning(error, everything_runs):
    calls = []
    with cvg.trace_backends() as ran, pytest.warns(RuntimeWarning) as said:
        assert run_kernel("attention", "auto", FACTS, failing(error, calls)) == "attention"
        assert run_kernel("attention", "auto", FACTS, failing(error, calls)) == "attention"
        other = FACTS._replace(queries=5)
        assert run_kernel("attention", "auto", other, failing(error, calls)) == "attention"
    assert calls == ["_attention_stock", "attention", "attention", "attention"]
    assert ran == [("attention", "triton")] * 3
    (warning,) = said
    assert "the stock kernel of attention fails on cuda" in str(warning.message)
    assert str(error) in str(warning.message)
    # The backward pass, and another device, are other kernels.
    assert kernel_for("attention_backward", "auto", FACTS._replace(grad_out=True)).backend is Backend.STOCK
    second = FACTS._replace(device=torch.device("cuda", 1))
    assert kernel_for("attention", "auto", second).backend is Backend.STOCK


def test_what_torch_does_not_serve_now_it_may_serve_later(everything_runs, recwarn):
    """Its operators can be switched off for a while by a context: no failure, and nothing to remember."""
    calls = []
    switched_off = failing(cvg.BackendUnavailableError("switched off"), calls)
    for _ in range(2):
        assert run_kernel("attention", "auto", FACTS, switched_off) == "attention"
    assert calls == ["_attention_stock", "attention"] * 2 and not recwarn.list


def test_a_module_that_cannot_be_loaded_is_a_kernel_that_fails(everything_runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "cvg_kernels._triton.attention", None)  # as import has it
    facts = FACTS._replace(keys=5)  # Triton goes first
    with pytest.warns(RuntimeWarning, match="the triton kernel of attention fails .*ModuleNotFoundError"):
        assert run_kernel("attention", "auto", facts, lambda module: module.__name__[-5:]) == "stock"
    with pytest.raises(ImportError):
        run_kernel("attention", "triton", facts, lambda module: None)


@pytest.mark.parametrize(
    "error",
    [
        cvg.ArgumentError("token_ids must lie in [0, 3)"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["argument", "memory", "torch's memory", "memory of a launch"],
)
def test_what_is_wrong_with_the_call_is_not_the_kernels_fault(error, everything_runs):
    calls = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(error)):
            run_kernel("attention", "auto", FACTS, failing(error, calls))
    assert calls == ["_attention_stock"]
    assert kernel_for("attention", "auto", FACTS).backend is Backend.STOCK


def test_a_named_kernel_that_fails_is_never_replaced(everything_runs):
    calls = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(CompilationError):
                run_kernel("attention", "stock", FACTS, failing(CompilationError(), calls))
    assert calls == ["_attention_stock"] * 2
    # Nor is one that failed under `auto` out of reach by its name.
    with pytest.warns(RuntimeWarning):
        run_kernel("attention", "auto", FACTS, failing(CompilationError(), calls))
    assert kernel_for("attention", "stock", FACTS).backend is Backend.STOCK


def test_a_defect_of_the_reference_or_the_compiled_kernels_is_not_hidden():
    def call(module):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_kernel("path_flow", "auto", Facts(CPU, torch.float32), call)


def test_a_failure_of_a_real_call_gives_the_right_answer(monkeypatch):
    """token_peaks by a kernel that fails in its backward pass only: both passes still give what they should."""

    def backward(*call):
        raise CompilationError("in the backward pass only")

    from cvg_kernels.ops import _token_peaks_reference as reference

    broken = SimpleNamespace(forward=reference.forward, backward=backward)
    rule = auto.Rule("token_peaks", {}, (Backend.TRITON,))
    monkeypatch.setattr(auto, "_rules_of", lambda device: [(rule,)])
    monkeypatch.setattr(_choice, "unavailable_reason", lambda *call: None)
    monkeypatch.setitem(sys.modules, "cvg_kernels._triton.token_peaks", broken)
    flow = torch.rand(1, 3, 2, 3, 4, requires_grad=True)
    with cvg.trace_backends() as ran, pytest.warns(RuntimeWarning, match="backward pass only"):
        (found,) = torch.autograd.grad(cvg.token_peaks(flow).sum(), flow)
    assert ran == [("token_peaks", "triton"), ("token_peaks_backward", "reference")]
    (wanted,) = torch.autograd.grad(cvg.token_peaks(flow, backend="reference").sum(), flow)
    torch.testing.assert_close(found, wanted)
