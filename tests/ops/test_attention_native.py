"""The C++ kernels: every instruction-set level, any number of threads, and memory safety."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import cvg_kernels as cvg
from cvg_kernels import native
from cvg_kernels.environment import modules
from cvg_kernels.ops import _attention_native as native_core
from cvg_kernels.ops import _attention_reference as reference
from cvg_kernels.ops._attention_call import AttentionCall, AttentionGrads, AttentionResult, Band, Needed
from tests.ops.levels import EVERY_LEVEL
from tests.tolerance import assert_as_exact_as, relative_error

pytestmark = pytest.mark.skipif(native.reason("cpu") is not None, reason=str(native.reason("cpu")))

_LEVEL_CHECK = """
from cvg_kernels import native
from tests.ops.test_attention_native import CASES, check
import torch
assert native.load("cpu").isa() == {level!r}
torch.manual_seed({seed})
for case in CASES:
    check(case, torch.float32)
for dtype in (torch.float64, torch.bfloat16, torch.float16):
    for case in (CASES[0], CASES[2], CASES[6]):
        check(case, dtype)
"""


class Case(NamedTuple):
    """A call of the core: sizes, and what it has of all it may have."""

    name: str
    queries: int
    keys: int
    dim: int = 20
    value_dim: int = 12
    values: bool = True
    tokens: tuple[int, ...] = (3, 0, 3, 7)
    key_bias: bool = False
    token_bias: str = ""  # "full", "expanded"
    band: float | None = None  # its strength
    row_max_grad: bool = True
    head_mean: bool = True


CASES = [
    Case("one-tile", 37, 21),
    Case("more-tiles", 150, 700, key_bias=True, head_mean=False),
    Case("token-bias", 37, 21, token_bias="full", key_bias=True),
    Case("token-bias, more-tiles", 40, 700, 33, 40, token_bias="expanded", head_mean=False),
    Case("token-bias, no values", 40, 530, values=False, token_bias="full"),
    Case("band", 37, 21, band=1.0),
    Case("band, more-tiles", 90, 700, 64, 48, band=0.7, head_mean=False),
    Case("band, constant m", 40, 530, band=-0.6, row_max_grad=False),
    Case("band, no values", 40, 530, band=1.0, values=False),
    Case("band, no maps", 40, 530, band=1.0, tokens=()),
    Case("no maps", 70, 530, key_bias=True, tokens=()),
    Case("more tokens than a block", 19, 40, tokens=tuple(range(40)) * 2),
]
by_name = {"ids": lambda case: case.name}


def make_call(case: Case, dtype: torch.dtype) -> AttentionCall:
    """Random arguments, query, key and value as `[B, N, H, D]` lies in memory."""

    def tensor(length: int, dim: int) -> torch.Tensor:
        return torch.randn(2, length, 3, dim).to(dtype).transpose(1, 2)

    wide = torch.promote_types(dtype, torch.float32)
    ids = torch.tensor([case.tokens, case.tokens[::-1]]) if case.tokens else None
    key_bias = token_bias = band = None
    if case.key_bias:  # one key of the batch's second entry is not seen
        key_bias = torch.randn(2, case.keys, dtype=wide)
        key_bias[1, 5] = -torch.inf
    if case.token_bias:
        of_key = torch.randn(2, case.keys, case.queries, dtype=wide)
        if case.token_bias == "expanded":
            of_key = of_key[..., :1].expand(of_key.shape)
        token_bias = torch.stack([rows[index] for rows, index in zip(of_key, ids, strict=True)])
        if case.token_bias == "expanded":
            token_bias = token_bias[..., :1].expand(token_bias.shape)
    if case.band is not None:
        frames = [torch.arange(n) * 6 // n - 1 for n in (case.queries, case.keys)]
        band = Band(*(f.int() for f in frames), 1.5, case.band, case.row_max_grad)
    value = tensor(case.keys, case.value_dim) if case.values else None
    query, key = tensor(case.queries, case.dim), tensor(case.keys, case.dim)
    scale = case.dim**-0.5
    return AttentionCall(query, key, value, ids, key_bias, token_bias, band, scale, case.head_mean)


def in_float64(given):
    """A call, a result or gradients with every floating tensor in float64."""
    return type(given)(*(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given))


def cotangents(result: AttentionResult) -> AttentionGrads:
    """Random gradients of every result there is."""
    made = (None if t is None else torch.randn_like(t) for t in result[:3])
    return AttentionGrads(*made)


def everything(call: AttentionCall) -> Needed:
    """All gradients that the call can have."""
    return Needed(True, True, call.value is not None, call.token_bias is not None)


def summed_over_repeats(grad: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gradient of the bias of every key, `[B, keys, N]`."""
    total = grad.new_zeros(grad.shape[0], int(ids.max()) + 1, grad.shape[2])
    return total.scatter_add(1, ids[..., None].expand(grad.shape), grad)


def assert_right(mine, plain, right, depth, factor=1.5) -> None:
    """Asserts the budget of `plain`, which is the reference in the same precision;
    of float64, of sums of roundings.
    """
    if mine.dtype == plain.dtype == torch.float64:
        assert relative_error(mine, right) <= 8 * depth * torch.finfo(torch.float64).eps
    else:
        assert_as_exact_as(mine, plain, right, factor, depth=depth)


def check(case: Case, dtype: torch.dtype) -> None:
    """Forward, capture and every gradient, within the budget of the reference in the same precision."""
    call = make_call(case, dtype)
    exact_call = in_float64(call)
    found, stock, exact = (
        core.forward(given) for core, given in ((native_core, call), (reference, call), (reference, exact_call))
    )
    # a rounding of m reaches the logits `strength` times
    depth = max(case.queries, case.keys, case.dim) * (1 + abs(case.band or 0)) ** 2
    for name, mine, plain, right in zip(found._fields[:4], found, stock, exact, strict=False):
        assert (mine is None) == (right is None), name
        if mine is not None:
            assert mine.dtype == plain.dtype and mine.stride() == plain.stride(), name
            assert_right(mine, plain, right, depth)
    if call.token_ids is not None:
        maps = native_core.capture(call, found.lse)
        assert maps.is_contiguous() and maps.dtype == found.maps.dtype
        assert_right(maps, stock.maps, exact.maps, depth)

    grads, needed = cotangents(found), everything(call)
    mine = native_core.backward(call, found, grads, needed)
    plain = reference.backward(call, stock, grads, needed)
    right = reference.backward(exact_call, exact, in_float64(grads), needed)
    assert [g is None for g in mine] == [not need for need in needed]
    for kind, *three in zip(needed._fields, mine, plain, right, strict=True):
        if three[0] is None:
            continue
        assert three[0].dtype == three[1].dtype and three[0].stride() == three[1].stride(), kind
        if kind == "token_bias":  # wide, but δ is made of `out`, which has the query's precision
            three[1] = three[1].to(dtype).to(three[1].dtype)
            three = [summed_over_repeats(g, call.token_ids) for g in three]
        assert_right(*three, depth, 2.0)


@pytest.mark.parametrize("case", CASES, **by_name)
def test_results_and_gradients(case):
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], **by_name)
def test_low_precision(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[5], CASES[6]], **by_name)
def test_a_gradient_is_the_same_alone(case):
    """What is not asked for is not computed, and changes no bit of the rest."""
    call = make_call(case, torch.float32)
    result = native_core.forward(call)
    grads, needed = cotangents(result), everything(call)
    together = native_core.backward(call, result, grads, needed)
    for at, need in enumerate(needed):
        if need:
            alone = native_core.backward(call, result, grads, Needed(*(i == at for i in range(4))))
            assert [g is None for g in alone] == [i != at for i in range(4)]
            assert torch.equal(alone[at], together[at])


def test_a_captured_row_that_sees_no_key():
    """Maps, gradients and the bias' gradient are 0, from the forward pass and from a known log-sum-exp."""
    call = make_call(CASES[2], torch.float32)
    token_bias = call.token_bias.clone()
    token_bias[0, :, 4] = -torch.inf
    key_bias = torch.full_like(call.key_bias, -torch.inf)
    key_bias[:, list(CASES[2].tokens)] = 0
    call = call._replace(token_bias=token_bias, key_bias=key_bias)
    result = native_core.forward(call)
    assert result.lse[0, :, 4].eq(-torch.inf).all() and result.lse[0, :, 5].isfinite().all()
    assert not result.out[0, :, 4].any() and not result.maps[0, :, 4].any()
    assert torch.equal(native_core.capture(call, result.lse)[0, :, 4], result.maps[0, :, 4])
    found = native_core.backward(call, result, cotangents(result), everything(call))
    assert not found[0][0, :, 4].any() and not found[3][0, :, 4].any()
    assert all(grad.isfinite().all() for grad in found)


@pytest.mark.drawn(3)
@pytest.mark.parametrize("level", EVERY_LEVEL)
def test_every_level_of_this_machine(level, request, fresh, tmp_path):
    code = _LEVEL_CHECK.format(level=level, seed=request.config.seed)
    fresh.right(code, tmp_path, CVG_CPU_ISA=level)


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
def test_an_unknown_level_is_refused(level, call, fresh, tmp_path):
    ran = fresh(call, tmp_path, CVG_CPU_ISA=level)
    assert ran.returncode != 0
    there = ", ".join(native.load("cpu").levels())
    assert ran.stderr.strip().splitlines()[-1] == (
        "cvg-kernels info: CVG_CPU_ISA must be one of what was built and this machine can run "
        f"({there}), got '{level}'"
    )


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("level", ["", "baseline"])
def test_info_names_the_level_and_what_caps_it(level, fresh, tmp_path):
    shown_by = "from cvg_kernels.cli import main; raise SystemExit(main(['info']))"
    told = fresh.right(shown_by, tmp_path, CVG_CPU_ISA=level)
    best = native.load("cpu").levels()[-1]
    shown = f"baseline (CVG_CPU_ISA; this machine can run {best})" if level else best
    assert f"yes: {shown}, built by" in told
    assert f"for {', '.join(native.load('cpu').built_levels())}" in told


def test_info_says_what_this_machine_could_run(monkeypatch):
    class Module:
        isa, processor_levels = (staticmethod(lambda: "baseline"), staticmethod(lambda: ["baseline", "avx2"]))
        built_levels = levels = staticmethod(lambda: ["baseline"])

    monkeypatch.setattr(native, "reason", lambda target: None if target == "cpu" else "not asked for")
    monkeypatch.setattr(native, "load", lambda target: Module)
    told = modules()["cpu"]
    assert told.endswith("for baseline; this machine can run avx2 too: reinstall here, or with CVG_CPU_LEVELS=all")


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
    call = make_call(CASES[0], torch.float32)
    call.token_ids[1, 2] = 21
    known = native_core.forward(call._replace(token_ids=None))
    for use in (native_core.forward, lambda call: native_core.capture(call, known.lse)):
        with pytest.raises(IndexError, match=r"token_ids must lie in \[0, 21\), got 21"):
            use(call)
