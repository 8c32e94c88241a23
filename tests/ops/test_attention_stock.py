"""The backend 'stock': torch's fused attention, maps from its log-sum-exp, gradients through spare columns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cvg_kernels as cvg
from cvg_kernels.ops import _attention_reference as reference
from cvg_kernels.ops import _attention_stock as stock
from cvg_kernels.ops import _fused_attention as fused
from cvg_kernels.ops._attention_call import AttentionCall, AttentionGrads, Needed
from tests.ops.backends import DEVICE, backends
from tests.tolerance import assert_as_exact_as, relative_error

CPU = torch.device("cpu")
IDS = [[1, 1, 33], [0, 70, 2]]

pytestmark = pytest.mark.skipif(
    stock.reason(DEVICE, torch.bfloat16) is not None, reason=str(stock.reason(DEVICE, torch.bfloat16))
)


def call_of(dtype, head_mean=True, dim=40, heads=3, device=DEVICE) -> AttentionCall:
    query, key, value = (torch.randn(2, n, heads, dim).to(device, dtype).transpose(1, 2) for n in (50, 77, 77))
    ids = torch.tensor(IDS, device=device)
    return AttentionCall(query, key, value, ids, None, None, None, 0.3, head_mean)


def exact(call: AttentionCall) -> AttentionCall:
    return call._replace(query=call.query.double(), key=call.key.double(), value=call.value.double())


@pytest.mark.parametrize("maps_by", ["kernel", "plain operations"])
@pytest.mark.parametrize("head_mean", [True, False], ids=["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients(dtype, head_mean, maps_by, monkeypatch):
    """Against float64, whatever gradients arrive; the budget is the reference's own error in the same precision."""
    if maps_by == "plain operations":
        monkeypatch.setattr(stock, "_kernels_of", lambda call: None)
        monkeypatch.setattr(stock, "_BLOCK", 1)  # a head at a time
    call = call_of(dtype, head_mean)
    found, right = stock.forward(call), reference.forward(exact(call))
    plain = scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scale)
    assert_as_exact_as(found.out, plain, right.out, depth=77)
    assert found.out.stride() == call.query.stride()
    # Torch's own log-sum-exp is what the maps are as exact as; on the CPU it is not summed in float32 for 16 bits.
    lse_error = (found.lse - right.lse).abs().max().item()
    assert lse_error < (1e-5 if dtype == torch.float32 else 1e-4)
    assert relative_error(found.maps, right.maps) < 2 * lse_error + 1e-5
    arriving = [torch.randn_like(t) for t in (found.out, found.maps, found.lse)]
    for names in ("out", "maps", "lse", "out maps", "out maps lse"):
        grads = AttentionGrads(
            *(t if n in names else None for t, n in zip(arriving, ("out", "maps", "lse"), strict=True))
        )
        wide = AttentionGrads(*(None if t is None else t.double() for t in grads))
        needed = Needed(True, True, True)
        mine = stock.backward(call, found, grads, needed)
        wanted = reference.backward(exact(call), right, wide, needed)
        # What stock attention makes of a gradient of its output: roundings of P, dP and dS, which reach all gradients.
        own = stock.backward(call, found, AttentionGrads(arriving[0], None, None), needed)
        own_right = reference.backward(exact(call), right, AttentionGrads(arriving[0].double(), None, None), needed)
        for which in range(3):
            if names in ("maps", "lse", "maps lse") and which == 2:
                assert (mine[2] == 0).all()
                continue
            budget = 3 * relative_error(own[which], own_right[which]) + 2 * torch.finfo(dtype).eps
            assert relative_error(mine[which], wanted[which]) < budget + 1e-5, (names, which)
        assert mine[0].stride() == call.query.stride()


def test_only_what_is_needed_goes_out():
    call = call_of(torch.float32)
    result = stock.forward(call)
    grads = AttentionGrads(torch.randn_like(result.out), torch.randn_like(result.maps), None)
    everything = stock.backward(call, result, grads, Needed(True, True, True))
    for which in range(3):
        needed = Needed(*(at == which for at in range(3)))
        found = stock.backward(call, result, grads, needed)
        assert [grad is not None for grad in found[:3]] == list(needed[:3])
        torch.testing.assert_close(found[which], everything[which])


@pytest.mark.parametrize("backend", backends("attention", "stock"))
@pytest.mark.parametrize("batch, queries", [(0, 4), (2, 0)], ids=["no-sample", "no-query"])
def test_empty(backend, batch, queries):
    query, key, value = (torch.randn(batch, 2, n, 8, device=DEVICE, requires_grad=True) for n in (queries, 5, 5))
    found = cvg.attention_with_capture(query, key, value, [1, 2], backend=backend)
    assert found.out.shape == (batch, 2, queries, 8) and found.maps.shape == (batch, 2, queries)
    for grad in torch.autograd.grad(found.out.sum() + found.maps.sum(), (query, key, value)):
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", backends("attention", "stock"))
def test_by_name(backend):
    query, key, value = (t.requires_grad_() for t in call_of(torch.bfloat16)[:3])
    with cvg.trace_backends() as ran:
        found = cvg.attention_with_capture(query, key, value, IDS, scale=0.3, backend=backend)
        torch.autograd.grad(found.out.sum() + found.maps.sum(), (query, key, value))
    assert ran == [("attention", "stock"), ("attention_backward", "stock")]


@pytest.mark.parametrize(
    "options",
    [
        {"key_mask": torch.ones(2, 77, dtype=torch.bool)},
        {"token_bias": torch.zeros(3)},
        {"band": cvg.FrameBand([0] * 50, [0] * 77, 1.0)},
    ],
    ids=["mask", "token bias", "band"],
)
def test_what_it_does_not_serve_is_said(options):
    query, key, value = call_of(torch.float32, device=CPU)[:3]
    with pytest.raises(cvg.CvgError, match="stock"):
        cvg.attention_with_capture(query, key, value, [0, 1, 2], backend="stock", **options)
    with pytest.raises(cvg.ArgumentError, match="stock"):
        cvg.attention_with_capture(query, key, value[..., :8], [0], backend="stock")


def test_an_operator_with_another_schema_is_left_alone():
    (operator,) = fused.operators_of(CPU)
    other = replace(operator, schema="(Tensor query) -> Tensor")
    assert "another schema of flash_attention_for_cpu" in fused._other_schema(other)
    assert fused._other_schema(operator) is None
    gone = replace(operator, name="attention_of_tomorrow")
    assert "has no operator attention_of_tomorrow" in fused._other_schema(gone)


@pytest.mark.parametrize("wrong", ["lse", "dk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_operator_with_wrong_numbers_is_left_alone(wrong, dtype):
    (operator,) = fused.operators_of(CPU)
    assert fused._wrong_numbers(operator, CPU, dtype) is None

    def base_two(*given):
        out, lse = operator.forward(*given)
        return out, lse * 1.4427

    def transposed(*given):
        dq, dk, dv = operator.backward(*given)
        return dq, dv, dk

    changed = {"forward": base_two} if wrong == "lse" else {"backward": transposed}
    found = fused._wrong_numbers(replace(operator, **changed), CPU, dtype)
    assert found.startswith(f"its {wrong} is off by")


def test_an_operator_that_fails_is_left_alone():
    (operator,) = fused.operators_of(CPU)

    def fail(*given):
        raise RuntimeError("no kernel image\nfor this device")

    found = fused._wrong_numbers(replace(operator, forward=fail), CPU, torch.float32)
    assert found == "it fails on cpu: no kernel image"


def test_verdicts_are_kept(monkeypatch):
    """The operator is tried once in a process, also from within inference mode and autocast."""
    (operator,) = fused.operators_of(CPU)
    tried = []
    monkeypatch.setattr(fused, "_wrong_numbers", lambda *case: tried.append(case))
    known = {}
    monkeypatch.setattr(fused, "_verdicts", lambda: known)
    for _ in range(2):
        assert fused.unfit(operator, CPU, torch.float32) is None
    assert len(tried) == 1


def test_the_check_leaves_no_trace_in_autograd():
    """Hooks on saved tensors are the caller's: checkpointing counts what it sees."""
    (operator,) = fused.operators_of(CPU)

    def refuse(tensor):
        raise AssertionError("a tensor was saved")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        assert fused._wrong_numbers(operator, CPU, torch.float32) is None


def test_the_check_runs_in_any_mode():
    (operator,) = fused.operators_of(CPU)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert fused._wrong_numbers(operator, CPU, torch.float32) is None
