"""The forward kernel of attention with specialised warps:
what it computes and refuses, what the compiler makes of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
from triton.runtime import _allocation  # noqa: E402

import cvg_kernels as cvg  # noqa: E402
from cvg_kernels._layout import lies_like  # noqa: E402
from cvg_kernels._triton import attention_specialised  # noqa: E402
from cvg_kernels._triton.launch import Launch  # noqa: E402
from cvg_kernels.kernels import Backend, Facts  # noqa: E402
from cvg_kernels.ops import _attention_reference as reference  # noqa: E402
from cvg_kernels.ops import _choice  # noqa: E402
from cvg_kernels.ops._attention_call import AttentionCall  # noqa: E402
from tests.tolerance import assert_as_exact_as  # noqa: E402

CPU = torch.device("cpu")


def on_this_machine(facts: Facts) -> str | None:
    return _choice.why_not("attention", Backend.TRITON_SPECIALISED, facts)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = on_this_machine(Facts(DEVICE, torch.float16, 1, 1, 1, 1, 64, 64))
runs = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def rows(length: int, dim: int, dtype=torch.float16, *, batch=1, heads=2) -> torch.Tensor:
    """Random rows of heads as diffusers has them: heads inside tokens."""
    return torch.randn(batch, length, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)


def call_of(query, key, value, tokens: int | None = 3, scale=0.3, head_mean=True) -> AttentionCall:
    ids = None
    if tokens is not None:
        ids = torch.stack([torch.randperm(key.shape[2])[:tokens] for _ in range(len(key))]).to(DEVICE)
    return AttentionCall(query, key, value, ids, None, None, None, scale, head_mean)


def check(call: AttentionCall) -> None:
    found, stock = attention_specialised.forward(call), reference.forward(call)
    exact = reference.forward(
        call._replace(query=call.query.double(), key=call.key.double(), value=call.value.double())
    )
    depth = 4 * (call.query.shape[3] + call.key.shape[2])
    for name in ("out", "maps", "lse"):
        result, usual, wanted = (getattr(results, name) for results in (found, stock, exact))
        assert (result is None) == (wanted is None), name
        if result is not None:
            assert_as_exact_as(result, usual, wanted, depth=depth)
    assert lies_like(found.out, call.query)
    assert found.row_max is None and found.row_argmax is None


@pytest.mark.drawn(6)
@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(37, 301, 64), (131, 77, 128), (129, 256, 64), (1, 1, 64)])
def test_against_float64(queries, keys, dim, dtype):
    """One tile of keys and several, the last one whole and not, the tile of queries whole and not."""
    heads = [rows(length, dim, dtype, batch=2) for length in (queries, keys, keys)]
    check(call_of(*heads, tokens=1))


@runs
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale):
    check(call_of(rows(19, 64), rows(150, 64), rows(150, 64), scale=scale))


@runs
@pytest.mark.parametrize("head_mean", [True, False])
@pytest.mark.parametrize("tokens", [None, 0, 5])
def test_maps(tokens, head_mean):
    check(call_of(rows(19, 64), rows(150, 64), rows(150, 64), tokens, head_mean=head_mean))


@pytest.mark.drawn(8, of="long tests")
@runs
def test_what_no_descriptor_takes_is_copied():
    """Rows of odd strides, rows that begin beside 16 bytes, a last axis with gaps, and heads that share their rows."""
    odd = torch.randn(1, 150, 2, 67, device=DEVICE).half().transpose(1, 2)[..., :64]
    beside = torch.randn(150 * 2 * 64 + 1, device=DEVICE).half()[1:].view(1, 150, 2, 64).transpose(1, 2)
    gaps = torch.randn(1, 2, 150, 128, device=DEVICE).half()[..., ::2]
    shared = torch.randn(1, 1, 150, 64, device=DEVICE).half().expand(1, 2, 150, 64)
    for tensor in (odd, beside, gaps, shared):
        assert not attention_specialised._describable(tensor)
        check(call_of(rows(19, 64), tensor, rows(150, 64)))
        check(call_of(tensor, rows(40, 64), rows(40, 64)))
        check(call_of(rows(19, 64), rows(150, 64), tensor))
    wide = torch.randn(1, 150, 3, 2, 64, device=DEVICE).half()[:, :, 1].transpose(1, 2)
    assert attention_specialised._describable(wide)  # of a fused projection
    check(call_of(rows(19, 64), wide, wide))


@runs
def test_nothing_to_do():
    for shape in ((0, 2), (1, 0)):
        heads = [rows(length, 64, batch=shape[0], heads=shape[1]) for length in (5, 7, 7)]
        result = attention_specialised.forward(call_of(*heads, tokens=None))
        assert result.out.shape == (*shape, 5, 64)
    result = attention_specialised.forward(call_of(rows(0, 64), rows(7, 64), rows(7, 64)))
    assert result.maps.shape == (1, 3, 0)


@pytest.mark.drawn(8, of="long tests")
@runs
def test_the_operation_with_its_gradient_by_name():
    heads = [rows(length, 64) for length in (21, 140, 140)]
    for tensor in heads:
        tensor.requires_grad_()
    wide = [tensor.detach().double().requires_grad_() for tensor in heads]

    def grads(tensors, backend):
        result = cvg.attention_with_capture(*tensors, token_ids=[0, 3], backend=backend)
        return torch.autograd.grad(result.out.double().square().sum() + result.maps.double().sum(), tensors)

    with cvg.trace_backends() as ran:
        found = grads(heads, "triton_specialised")
    assert ran == [("attention", "triton_specialised"), ("attention_backward", "triton_specialised")]
    for have, usual, want in zip(found, grads(heads, "reference"), grads(wide, "reference"), strict=True):
        assert_as_exact_as(have, usual, want, depth=4 * 200)


@runs
def test_the_allocator_of_the_process_stays(monkeypatch):
    """Descriptors need memory of an allocator: ours during the launch, and the user's before and after."""

    def users(size, alignment, stream):
        raise AssertionError("the user's allocator is not ours to use")

    during = []
    run = Launch.run

    def watched(launch):
        during.append(_allocation._allocator.get()(128, 128, None))
        run(launch)

    monkeypatch.setattr(Launch, "run", watched)
    before = _allocation._allocator.get()
    triton.set_allocator(users)
    try:
        attention_specialised.forward(call_of(rows(5, 64), rows(7, 64), rows(7, 64), tokens=None))
        assert _allocation._allocator.get() is users
    finally:
        triton.set_allocator(before)
    (memory,) = during
    assert memory.numel() == 128 and memory.device.type == DEVICE.type


# --- what is refused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "given", "refused"),
    [
        (torch.float32, {}, "in dtype torch.float32"),
        (torch.float16, {"head_dim": 80, "value_dim": 80}, "head_dim 80"),
        (torch.float16, {"value_dim": 128}, "head_dim 64 and 128 of value"),
        (torch.float16, {"value_dim": 0}, "no values"),
        (torch.float16, {"keys": 0}, "no keys"),
        (torch.float16, {"key_bias": True}, "a key mask"),
        (torch.float16, {"token_bias": True}, "a bias on tokens"),
        (torch.float16, {"band": True}, "a band"),
    ],
)
@pytest.mark.parametrize("operation", ["attention", "attention_backward"])
def test_limits_speak(operation, dtype, given, refused, monkeypatch):
    monkeypatch.setattr(_choice, "unavailable_reason", lambda *call: None)
    facts = Facts(CPU, dtype, **{"keys": 8, "head_dim": 64, "value_dim": 64, **given})
    with pytest.raises(cvg.ArgumentError, match=refused):
        _choice.kernel_for(operation, "triton_specialised", facts)
    plain = Facts(CPU, torch.float16, keys=8, head_dim=64, value_dim=64)
    chosen = _choice.kernel_for(operation, "triton_specialised", plain)
    assert chosen.module is attention_specialised


@pytest.mark.parametrize(
    ("capability", "hip", "refused"),
    [
        ((9, 0), None, None),
        ((8, 0), None, "capability 8.0"),
        ((10, 0), None, "capability 10.0"),
        ((9, 0), "6.4", "an AMD GPU"),
    ],
)
def test_it_is_for_hopper(capability, hip, refused, monkeypatch):
    monkeypatch.setattr(_choice, "unavailable_reason", lambda *call: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    facts = Facts(torch.device("cuda", 0), torch.float16, keys=8, head_dim=64, value_dim=64)
    if refused is None:
        chosen = _choice.kernel_for("attention", "triton_specialised", facts)
        assert chosen.module is attention_specialised
        return
    with pytest.raises(cvg.ArgumentError, match=refused):
        _choice.kernel_for("attention", "triton_specialised", facts)


def test_a_triton_without_descriptors_is_told(monkeypatch):
    """As 3.2 is, which torch 2.6 comes with; the other kernels of Triton do without."""
    monkeypatch.delattr("triton.language.make_tensor_descriptor")
    with pytest.raises(cvg.BackendUnavailableError, match="the installed Triton has no tensor descriptors"):
        cvg.backends.require("attention", cvg.Backend.TRITON_SPECIALISED)
    reason = cvg.backends.unavailable_reason("attention", cvg.Backend.TRITON)
    assert reason is None or "descriptors" not in reason


# --- what the compiler makes of it
# ------------------------------------------------------------------------------------

_COMPILE = """
import json, sys, torch
from dataclasses import asdict
from cvg_kernels._triton.attention_specialised import forward_launches
from cvg_kernels.bench.static.compiled import row_of
from cvg_kernels.ops._attention_call import AttentionCall

def rows(length, dim):
    return torch.empty(2, length, 8, dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)

found = []
for dim in (64, 128):
    for keys in (2000, 2048):
        call = AttentionCall(rows(2000, dim), rows(keys, dim), rows(keys, dim), *[None] * 4, 0.125, True)
        (launch,), _ = forward_launches(call, processors=132)
        found.append(asdict(row_of(f"D {dim}, {keys} keys", "bfloat16", "sm_90", launch)))
json.dump(found, sys.stdout)
"""


@pytest.mark.drawn(8, of="long tests")
def test_the_compiler_specialises_it_for_hopper():
    """It may leave a loop as it is without a word: asked of the machine code."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    compiled = json.loads(ended.stdout)
    assert len(compiled) == 4
    for row in compiled:
        told = {name: value for name, value in row.items() if name != "loops"}
        assert row["specialised"] and row["tma"] >= 4 and row["wgmma"], told
        assert row["spills"] == 0 and row["shared_bytes"] <= 232_448, told
        assert row["repeated"] == 1, told
        consumers = [loop for loop in row["loops"] if loop["inner"]]
        assert len(consumers) == 2, told  # of 64 rows each; they fetch nothing themselves
        assert all(loop["async_copies"] == 0 and loop["exp2"] >= 64 for loop in consumers), told
