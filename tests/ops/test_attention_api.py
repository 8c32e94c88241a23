"""attention_with_capture as torch and its user see it: registration, compilation, choice of backend, messages."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import scaled_dot_product_attention

import cvg_kernels as cvg
from cvg_kernels import native
from cvg_kernels.backends import Backend, unavailable_reason
from cvg_kernels.kernels import Facts
from cvg_kernels.ops import _attention_native, _choice
from cvg_kernels.ops import _attention_op as operation
from cvg_kernels.ops._attention_call import AttentionCall
from tests.ops.checks import CPU_BACKENDS, NATIVE, Counter


def inputs(dtype: torch.dtype = torch.float32, *, requires_grad: bool = True, queries: int = 5):
    """Query, key and value of 2 samples and 3 heads."""
    sizes = ((queries, 8), (7, 8), (7, 4))
    return [torch.randn(2, 3, *s, dtype=dtype, requires_grad=requires_grad) for s in sizes]


# --- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, masked, biased, head_mean, dtype, requires_grad, backend",
    [
        (True, True, False, False, torch.float32, True, "auto"),
        (True, False, False, True, torch.bfloat16, True, "auto"),
        (True, True, False, True, torch.float64, False, "auto"),
        (False, True, False, True, torch.float32, True, "auto"),
        (True, True, True, True, torch.float32, True, "auto"),
        (False, False, False, False, torch.float32, True, "reference"),
        (True, True, True, True, torch.float32, True, "reference"),
    ],
    ids=["all", "bf16", "fp64-no-grad", "maps-only", "token-bias", "reference-maps-only", "reference"],
)
@pytest.mark.drawn(8, of="long tests")
def test_opcheck_forward(values, masked, biased, head_mean, dtype, requires_grad, backend):
    query, key, value = inputs(dtype, requires_grad=requires_grad)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.promote_types(dtype, torch.float32)
    mask = torch.randn(2, 7, dtype=wide) if masked else None
    bias = torch.randn(2, 2, 1, dtype=wide).expand(-1, -1, 5) if biased else None
    ids = torch.tensor([[1, 2], [0, 3]])
    call = AttentionCall(query, key, value if values else None, ids, mask, bias, None, 0.3, head_mean)
    torch.library.opcheck(torch.ops.cvg_kernels.attention.default, (*operation.flat(call), False, backend))


@pytest.mark.parametrize(
    "arriving, needed",
    [
        ((True, True, True), (True, True, True)),
        ((True, False, False), (True, False, False)),
        ((False, True, False), (True, True, False)),
        ((False, False, True), (False, True, False)),
    ],
    ids=["all", "out-to-query", "maps-to-query-and-key", "lse-to-key"],
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.drawn(6)
def test_opcheck_backward(arriving, needed, backend):
    bias = torch.randn(2, 2, 5)
    ids = torch.tensor([[1, 2], [0, 3]])
    call = AttentionCall(*inputs(requires_grad=False), ids, None, bias, None, 0.3, True)
    call = operation.flat(call)
    results = torch.ops.cvg_kernels.attention.default(*call, False, backend)
    grads = [torch.randn_like(r) if yes else None for r, yes in zip(results[:3], arriving, strict=True)]
    torch.library.opcheck(
        torch.ops.cvg_kernels.attention_backward.default,
        (*grads, *call, results[0], *results[2:], [*needed, True], False, backend),
    )


@pytest.mark.parametrize(
    "outputs, needed",
    [
        (("out", "maps", "lse"), "query key value"),
        (("out",), "query"),
        (("out",), "value"),
        (("maps",), "query"),
        (("maps",), "query key value"),
        (("maps", "lse"), "key"),
        (("lse",), "query"),
    ],
    ids=lambda given: given.replace(" ", "-") if isinstance(given, str) else "+".join(given),
)
@NATIVE
def test_no_gradient_is_computed_that_nobody_asks_for(outputs, needed, monkeypatch):
    """The kernel is told just what arrives and what is needed; values are left alone where `out` has no gradient."""
    told = []

    def spy(*arguments):
        told.append(arguments)
        return backward(*arguments)

    backward = _attention_native.backward
    monkeypatch.setattr(_attention_native, "backward", spy)
    given = inputs(requires_grad=False)
    names = ("query", "key", "value")
    wanted = [t.requires_grad_() for t, name in zip(given, names, strict=True) if name in needed]
    with cvg.trace_backends() as ran:
        found = cvg.attention_with_capture(*given, [1, 2], backend="native")
        loss = sum(getattr(found, name).sum() for name in outputs)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    assert ran == [("attention", "native"), ("attention_backward", "native")]
    ((_, _, arriving, asked),) = told
    assert [grad is not None for grad in arriving] == [name in outputs for name in ("out", "maps", "lse")]
    used = [name in needed and (name != "value" or "out" in outputs) for name in names]
    assert list(asked) == [*used, False]
    assert [grad is not None for grad in grads] == [
        use for use, name in zip(used, names, strict=True) if name in needed
    ]


def test_second_derivative_of_a_kernel_names_the_reference():
    inputs = [torch.randn(1, 2, n, 3, requires_grad=True) for n in (2, 4, 4)]
    out = cvg.attention_with_capture(*inputs, [1]).out
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


# --- compilation -----------------------------------------------------------------------------------------------------


def everything(query, key, value, ids, mask, backend):
    """Both public functions, every output."""
    found = cvg.attention_with_capture(query, key, value, ids, key_mask=mask, head_reduction="none", backend=backend)
    alone = cvg.capture_maps(query, key, [0, 2], key_mask=mask, backend=backend)
    squares = found.out.square().sum() + found.maps.square().sum() + alone.maps.square().sum()
    return squares + found.lse.sum() + alone.lse.sum()


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
@pytest.mark.drawn(8, of="long tests")
def test_fullgraph_compile(backend, mask):
    """One graph forward, one backward, equal to eager; other sizes compile once more, then never again."""
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(everything, fullgraph=True, backend=aot_autograd(fw_compiler=counter))
    graphs = []
    for queries, keys in ((6, 11), (9, 13), (12, 15), (7, 19)):
        query = torch.randn(2, 2, queries, 8, requires_grad=True)
        key, value = torch.randn(2, 2, 2, keys, 8).unbind(0)
        key_mask = {"none": None, "additive": torch.randn(2, 1, 1, keys)}.get(mask)
        if mask == "bool":
            key_mask = (torch.rand(2, keys) < 0.6).index_fill(1, torch.tensor([0]), True)
        ids = torch.tensor([[3, 4], [0, 1]])
        (grad,) = torch.autograd.grad(compiled(query, key, value, ids, key_mask, backend), query)
        (wanted,) = torch.autograd.grad(everything(query, key, value, ids, key_mask, backend), query)
        torch.testing.assert_close(grad, wanted)
        graphs.append(counter.graphs)
    assert graphs == [2, 4, 4, 4]


@pytest.mark.drawn(6)
@pytest.mark.parametrize("shape", [(2, 15), (2, 1, 1, 15)], ids=["bool", "additive"])
def test_compiled_code_meets_a_mask_when_sizes_are_symbols(shape):
    """The number of keys is a symbol by then, that of the new mask a number: they must still compare equal."""
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for keys in (11, 13, 15):
        query = torch.randn(2, 2, 6, 8)
        key, value = torch.randn(2, 2, 2, keys, 8).unbind(0)
        mask = None
        if keys == 15:
            mask = torch.ones(shape, dtype=torch.bool) if len(shape) == 2 else torch.randn(shape)
        arguments = (query, key, value, torch.tensor([3, 4]), mask, "auto")
        torch.testing.assert_close(compiled(*arguments), everything(*arguments))


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's CPU compiler needs g++")
def test_compile_by_inductor():
    torch._dynamo.reset()
    query, key, value = inputs()
    arguments = (query, key, value, torch.tensor([3, 4]), torch.randn(2, 1, 1, 7), "auto")
    found = torch.autograd.grad(torch.compile(everything, fullgraph=True)(*arguments), query)
    torch.testing.assert_close(found, torch.autograd.grad(everything(*arguments), query))


def test_compiled_kernels_are_traced():
    torch._dynamo.reset()
    query, key, value = inputs()
    compiled = torch.compile(
        lambda *given: cvg.attention_with_capture(*given, [1]).out, fullgraph=True, backend="aot_eager"
    )
    with cvg.trace_backends() as ran:
        compiled(query, key, value)
    chosen = "reference" if native.reason("cpu") else "native"
    assert ran == [("attention", chosen)]


# --- choice of backend -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, dtype, usable, chosen",
    [
        ("cpu", torch.float32, {"native", "triton"}, "native"),
        ("cpu", torch.float64, {"native", "triton"}, "native"),
        ("cpu", torch.float32, {"triton"}, "reference"),
        ("cuda", torch.bfloat16, {"native", "triton"}, "triton"),
        ("cuda", torch.float64, {"native", "triton"}, "reference"),
        ("cuda", torch.bfloat16, {"native"}, "reference"),
        ("mps", torch.float32, {"native", "triton"}, "reference"),
    ],
)
def test_choice_of_auto(device, dtype, usable, chosen, monkeypatch):
    monkeypatch.setattr(
        _choice,
        "unavailable_reason",
        lambda _, backend, *call: None if backend.value in {*usable, "reference"} else "no",
    )
    facts = Facts(torch.device(device), dtype, keys=16, head_dim=64, value_dim=64)
    assert _choice.kernel_for("attention", "auto", facts).backend.value == chosen


def test_without_compiled_code(monkeypatch):
    """`auto` goes to the reference, gradient included; `native` by name says why it cannot."""
    monkeypatch.setattr(native, "reason", lambda target: "no compiler was found")
    given = inputs()
    with cvg.trace_backends() as ran:
        out, maps, _ = cvg.attention_with_capture(*given, [1, 1, 6])
        grads = torch.autograd.grad(out.sum() + maps.square().sum(), given)
    assert ran == [("attention", "reference"), ("attention_backward", "reference")]
    out, maps, _ = cvg.attention_with_capture(*given, [1, 1, 6], backend="reference")
    wanted = torch.autograd.grad(out.sum() + maps.square().sum(), given)
    for grad, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, right)
    with pytest.raises(cvg.BackendUnavailableError, match="'native'.*no compiler was found"):
        cvg.attention_with_capture(*given, [1], backend="native")


def test_triton_takes_cpu_tensors_in_its_interpreter_only(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(cvg.BackendUnavailableError, match="take tensors on a GPU, these are on cpu"):
        cvg.attention_with_capture(**GOOD, backend="triton")


def test_triton_refuses_float64(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = {name: t.double() if name != "token_ids" else t for name, t in GOOD.items()}
    with pytest.raises(cvg.ArgumentError, match="float64 is not supported by backend 'triton'"):
        cvg.attention_with_capture(**wide, backend="triton")


def test_native_refuses_other_devices():
    reason = unavailable_reason("attention", Backend.NATIVE, torch.device("cuda"))
    assert reason == "the native kernels take CPU tensors, these are on cuda"


def test_ids_without_numbers_are_refused():
    query, key, value = inputs()
    with pytest.raises(cvg.ArgumentError, match="token_ids must hold numbers, got a tensor on the"):
        cvg.attention_with_capture(query, key, value, torch.tensor([0, 1], device="meta"))


def test_shapes_on_meta_tensors():
    given = [t.to("meta") for t in inputs(torch.bfloat16)]
    found = cvg.attention_with_capture(*given, [1, 2])
    assert [tuple(t.shape) for t in found] == [(2, 3, 5, 4), (2, 2, 5), (2, 3, 5)]
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]


# --- masks, autocast, modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 1, 5, 7), (1, 3, 1, 7), (1, 1, 5, 1)], ids=str)
def test_dense_masks_go_to_the_reference(shape, kind):
    query, key, value = inputs(torch.float64, requires_grad=False)
    mask = torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    if kind == "bool":
        mask[..., 0] = True
    with cvg.trace_backends() as ran:
        out, _, lse = cvg.attention_with_capture(query, key, value, [0], key_mask=mask)
    assert ran == [("attention", "reference")]
    stock = mask.expand(2, 3, 5, 7)
    torch.testing.assert_close(out, scaled_dot_product_attention(query, key, value, stock))
    scores = query @ key.mT * 8**-0.5
    scores = scores.masked_fill(~stock, -torch.inf) if kind == "bool" else scores + stock
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (2, 3, 5, 7)], ids=["per-key", "dense"])
def test_the_reference_differentiates_the_mask(shape):
    given = [*inputs(torch.float64), torch.randn(shape, dtype=torch.float64, requires_grad=True)]

    def attend(query, key, value, mask):
        return tuple(cvg.attention_with_capture(query, key, value, [1, 2], key_mask=mask, backend="reference"))

    assert torch.autograd.gradcheck(attend, given)


def test_a_mask_that_requires_a_gradient_is_welcome_where_none_is_taken():
    mask = torch.zeros(1, 1, 1, 5, requires_grad=True)
    with torch.no_grad():
        cvg.attention_with_capture(**GOOD, key_mask=mask)
    with torch.inference_mode():
        cvg.attention_with_capture(**GOOD, key_mask=mask)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_autocast_casts_as_for_stock_attention(backend):
    """Mixed inputs become bfloat16, as torch's own attention has it; what follows is computed outside autocast."""
    query, key, value = inputs(requires_grad=False)
    options = {"key_mask": torch.randn(2, 1, 1, 7), "backend": backend}
    cast = [t.bfloat16().requires_grad_() for t in (query, key, value)]
    wanted = cvg.attention_with_capture(*cast, [1, 2], **options)
    leaf = query.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = cvg.attention_with_capture(leaf, key.bfloat16(), value, [1, 2], **options)
        (grad,) = torch.autograd.grad(found.maps.sum(), leaf)
    (right,) = torch.autograd.grad(wanted.maps.sum(), cast[0])
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    if backend != "reference":  # autocast reaches into the backward pass of plain PyTorch
        assert torch.equal(grad, right.float())
    wide = [t.double() for t in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        assert cvg.attention_with_capture(*wide, [1]).out.dtype == torch.float64


# --- messages --------------------------------------------------------------------------------------------------------


GOOD = {
    "query": torch.zeros(1, 2, 3, 4),
    "key": torch.zeros(1, 2, 5, 4),
    "value": torch.zeros(1, 2, 5, 4),
    "token_ids": [0],
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(3, 4)}, r"query must be a tensor \[B, H, length, head_dim\]"),
        ({"query": torch.zeros(1, 2, 3, 4, dtype=torch.int32)}, "query must be float32"),
        ({"key": torch.zeros(1, 2, 5, 4).half()}, "key must have the query's dtype"),
        ({"key": torch.zeros(1, 3, 5, 4)}, "key must have the query's batch and heads"),
        ({"key": torch.zeros(1, 2, 5, 6)}, "key must have the query's head_dim 4, got 6"),
        ({"value": torch.zeros(1, 2, 6, 4)}, "value must have the key's length 5, got 6"),
        ({"query": torch.zeros(1, 2, 3, 300)}, "head_dim of 1 to 256, got 300"),
        ({"token_ids": [5]}, r"token_ids must lie in \[0, 5\) for 5 keys, got 5"),
        ({"token_ids": [-1]}, "got -1"),
        ({"token_ids": []}, "token_ids must name at least one key"),
        ({"token_ids": 3}, r"token_ids must have shape \[K\] or \[B, K\] with B = 1, got \(\)"),
        ({"token_ids": [[0], [1, 2]]}, r"token_ids must be integers, \[K\] or \[B, K\], got"),
        ({"token_ids": [True]}, "token_ids must be int64 or int32, got torch.bool"),
        ({"token_ids": [1j]}, "token_ids must be int64 or int32, got torch.complex64"),
        ({"token_ids": torch.zeros(1, dtype=torch.uint16)}, "token_ids must be int64 or int32, got torch.uint16"),
        ({"token_ids": [0.5]}, "token_ids must be int64 or int32"),
        ({"token_ids": torch.zeros(2, 1, dtype=torch.int64)}, r"\[K\] or \[B, K\] with B = 1"),
        ({"key_mask": torch.zeros(1, 4)}, "key_mask must be bool"),
        ({"key_mask": torch.zeros(1, 5, dtype=torch.int64)}, "key_mask must be bool or floating"),
        ({"key_mask": [True] * 5}, "key_mask must be a tensor or None, got list"),
        ({"value": None}, r"value must be a tensor .*, got NoneType"),
        ({"key": torch.zeros(1, 2, 0, 4)}, "key must hold at least one key"),
        ({name: torch.zeros(1, 0, 5, 4) for name in ("query", "key", "value")}, "at least one head"),
        ({"scale": "big"}, "scale must be a number or None, got 'big'"),
        ({"head_reduction": "max"}, "head_reduction must be 'mean' or 'none', got 'max'"),
        ({"backend": "fastest"}, "backend must be one of 'auto'"),
        ({"backend": "native", "key_mask": torch.zeros(1, 1, 3, 5)}, "depends on the query or the head"),
        ({"key_mask": torch.zeros(1, 1, 1, 5, requires_grad=True)}, "key_mask must not require a gradient"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(cvg.ArgumentError, match=message):
        cvg.attention_with_capture(**(GOOD | change))


def test_a_named_backend_does_not_fall_back():
    with pytest.raises(cvg.BackendUnavailableError, match="attention has no cuda kernel"):
        cvg.attention_with_capture(**GOOD, backend="cuda")
