"""The forward kernels of the Triton attention core, each path by itself: what it computes, and that it was the one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from cvg_kernels._triton import attention_tiles  # noqa: E402
from cvg_kernels._triton.attention_forward import capture, capture_launches, forward_launches  # noqa: E402
from cvg_kernels._triton.launch import Launch, unit_strides  # noqa: E402
from cvg_kernels.ops import _attention_reference as reference  # noqa: E402
from cvg_kernels.ops._attention_call import AttentionCall, Band  # noqa: E402
from tests.tolerance import assert_as_exact_as  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_call(
    shape=(2, 2, 21, 37),
    dim=24,
    value_dim=None,
    tokens=3,
    dtype=torch.float32,
    *,
    scale=0.3,
    head_mean=True,
    masked=False,
    biased=False,
    band=False,
    ids=None,
    heads_last=True,
    values=True,
) -> AttentionCall:
    """A call with random numbers; `masked` hides keys, and all of them in the last sample."""
    batch, heads, queries, keys = shape

    def rows(length, size):
        if heads_last:
            return torch.randn(batch, length, heads, size, device=DEVICE).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, length, size, device=DEVICE).to(dtype)

    if ids is None and tokens is not None:
        ids = torch.stack([torch.randperm(keys)[:tokens] for _ in range(batch)])
    if ids is not None:
        ids = ids.to(DEVICE)
    key_bias = None
    if masked:
        key_bias = torch.randn(batch, keys, device=DEVICE)
        key_bias[:, keys // 2] = float("-inf")
        key_bias[-1] = float("-inf")
    frames = Band(
        (torch.arange(queries, device=DEVICE) // 5 - 1).to(torch.int32),
        (torch.arange(keys, device=DEVICE) // 9).to(torch.int32),
        1.3,
        0.7,
        True,
    )
    token_bias = None
    if biased:
        token_bias = torch.randn(batch, keys, queries, device=DEVICE)
        token_bias = token_bias.gather(1, ids[:, :, None].expand(-1, -1, queries))
    return AttentionCall(
        rows(queries, dim),
        rows(keys, dim),
        rows(keys, value_dim or dim) if values else None,
        ids,
        key_bias,
        token_bias,
        frames if band else None,
        scale,
        head_mean,
    )


def widened(call: AttentionCall) -> AttentionCall:
    """The call in float64."""
    return AttentionCall(
        *(part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in call)
    )


def run(launches: list[Launch]) -> list[str]:
    """Runs launches and names their kernels."""
    for launch in launches:
        launch.run()
    return [launch.kernel.__name__ for launch in launches]


def check(call: AttentionCall, path: list[str], processors: int = 1):
    """Runs the forward pass on the path that is named, and holds every result against float64."""
    launches, found = forward_launches(call, processors=processors)
    assert run(launches) == path
    exact, stock = reference.forward(widened(call)), reference.forward(call)
    for name in ("out", "maps", "lse", "row_max"):
        result, wanted, usual = (getattr(results, name) for results in (found, exact, stock))
        assert (result is None) == (wanted is None), name
        if result is None:
            continue
        seen = wanted != float("-inf")  # lse of a row without keys
        assert torch.equal(result[~seen].double(), wanted[~seen]), name
        depth = call.query.shape[-1] + call.key.shape[2]
        assert_as_exact_as(result[seen], usual[seen], wanted[seen], depth=4 * depth)
    if found.row_argmax is not None and call.query.dtype == torch.float32:
        assert torch.equal(found.row_argmax, exact.row_argmax)
    if found.out is not None:
        assert found.out.stride() == reference.forward(call).out.stride()
    return found


LONG, FEW = "forward_kernel", "few_keys_kernel"


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("keys", [1, 32, 37, 64])
def test_keys_in_a_loop(keys, scale):
    check(make_call((2, 2, 21, keys), tokens=1, scale=scale), [LONG, "add_maps_kernel"])


@pytest.mark.drawn(6)
@pytest.mark.parametrize("keys", [1, 16, 37, 64, 77, 80, 90, 100, 128])
def test_few_keys(keys):
    check(make_call((4, 3, 9, keys), dtype=torch.float16, tokens=1), [FEW])


@pytest.mark.drawn(6)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
def test_few_keys_of_any_scale(dtype, scale):
    check(make_call((2, 3, 70, 77), 40, dtype=dtype, tokens=5, scale=scale), [FEW])


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    "options",
    [
        {"masked": True},
        {"head_mean": False},
        {"values": False},
        {"heads_last": False, "value_dim": 40},
        {"tokens": None},
        {"masked": True, "head_mean": False},
    ],
)
def test_few_keys_with(options):
    shape = (4, 2, 21, 70)
    check(make_call(shape, **{"dtype": torch.float16, "tokens": 4, **options}), [FEW])


def test_heads_of_few_keys_are_shared_out_where_programs_are_few():
    call = make_call((2, 5, 21, 77), dtype=torch.float16)
    check(call, [FEW, "add_maps_kernel"])  # three heads and two
    check(call, [FEW, "add_maps_kernel"], processors=132)


@pytest.mark.drawn(6)
@pytest.mark.parametrize(
    "options",
    [
        {"masked": True},
        {"biased": True},
        {"masked": True, "biased": True},
        {"head_mean": False},
        {"values": False},
        {"heads_last": False, "value_dim": 40},
        {"dim": 1},
        {"dim": 3, "value_dim": 5},
        {"dim": 72},
        {"tokens": None},
        {"tokens": 0},
        {"band": True},
        {"band": True, "head_mean": False},
        {"band": True, "scale": -0.3},
        {"band": True, "scale": 0.0},
        {"band": True, "tokens": None},
    ],
)
def test_keys_in_a_loop_with(options):
    call = make_call(**options)
    path = [LONG]
    if call.token_ids is not None and call.head_mean and call.token_ids.shape[1]:
        if 4 * call.token_ids.shape[1] > call.query.shape[-1]:  # shares would move too much
            path.append("capture_kernel")
        path.append("add_maps_kernel")
    check(call, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"band": True}, {"masked": True, "biased": True}])
def test_keys_in_a_loop_of_16_bits(dtype, options):
    call = make_call((1, 2, 21, 140), dtype=dtype, tokens=3, **options)
    check(call, [LONG, "add_maps_kernel"])


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_to_attend(shape, dtype):
    call = make_call(shape, tokens=None, dtype=dtype)
    launches, found = forward_launches(call, processors=1)
    run(launches)
    assert torch.equal(found.out, torch.zeros_like(found.out))
    assert torch.equal(found.lse, torch.full_like(found.lse, float("-inf")))


@pytest.mark.drawn(8, of="long tests")
@pytest.mark.parametrize(
    "options",
    [{}, {"masked": True}, {"biased": True}, {"head_mean": False}, {"band": True}, {"masked": True, "biased": True}],
)
def test_more_tokens_than_a_program_holds(options):
    call = make_call((2, 2, 9, 70), 8, tokens=70, **options)
    check(call, [LONG, "capture_kernel"])


@pytest.mark.parametrize("keys", [77, 140])
@pytest.mark.parametrize("masked", [False, True])
def test_a_repeated_token_has_its_bias_once(keys, masked):
    ids = torch.tensor([[3, 5, 3, 3, 9], [1, 1, 2, 2, 0]])
    call = make_call((2, 2, 70, keys), dtype=torch.float16, ids=ids, biased=True, masked=masked)
    found = check(call, [LONG, "add_maps_kernel"])
    assert torch.equal(found.maps[0, 0], found.maps[0, 2])


def test_every_key_may_have_a_bias_and_hide():
    call = make_call((2, 2, 21, 6), tokens=6, biased=True)
    call.token_bias[0, :, :5] = float("-inf")  # rows that see nothing
    call.token_bias[1, 2] = float("-inf")
    found = check(call, [LONG, "add_maps_kernel"])
    assert (found.lse[0, :, :5] == float("-inf")).all()


def test_a_bias_that_rows_share_is_read_where_it_is():
    call = make_call(biased=True, tokens=2)
    queries = call.query.shape[2]
    call = call._replace(token_bias=call.token_bias[:, :, :1].expand(-1, -1, queries))
    assert call.token_bias.stride(-1) == 0
    check(call, [LONG, "add_maps_kernel"])


@pytest.mark.drawn(6)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masked": True},
        {"biased": True},
        {"head_mean": False},
        {"band": True},
        {"scale": -0.3},
        {"tokens": 70},
        {"masked": True, "biased": True},
        {"band": True, "tokens": 70},
        {"dtype": torch.float16},
    ],
)
def test_capture_from_a_known_lse(options):
    call = make_call((2, 3, 9, 71), 8, **options)
    exact = reference.forward(widened(call))
    stock = reference.forward(call)
    lse = exact.lse.float()
    assert_as_exact_as(capture(call, lse), stock.maps, exact.maps, depth=200)
    if call.band is None:
        launches, maps = capture_launches(call, lse, processors=132)
        shared = ["capture_kernel", "add_maps_kernel"] if call.head_mean else ["capture_kernel"]
        assert run(launches) == shared
        assert_as_exact_as(maps, stock.maps, exact.maps, depth=200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.skipif(DEVICE == "cuda", reason="reserves address space that nothing backs")
def test_offsets_of_heads_are_counted_in_64_bits(dtype):
    heads, step, size = 3, 2**30 + 8, 5 * 8
    storage = torch.empty(0, dtype=dtype).set_(_sparse_storage(((heads - 1) * step + size), dtype))
    spread = storage.as_strided((1, heads, 5, 8), (0, step, 8, 1))
    spread.copy_(torch.randn(1, heads, 5, 8))
    call = AttentionCall(spread, spread, spread, torch.tensor([[2, 4]]), None, None, None, 0.3, True)
    path = [LONG if dtype == torch.float32 else FEW, "add_maps_kernel"]
    launches, found = forward_launches(call, processors=1)
    names = run(launches)
    assert names == path
    wanted = reference.forward(widened(call))
    budget = reference.forward(call)
    assert_as_exact_as(found.out, budget.out, wanted.out, depth=20)
    assert_as_exact_as(found.maps, budget.maps, wanted.maps, depth=20)


def _sparse_storage(numbers: int, dtype: torch.dtype) -> torch.UntypedStorage:
    """Memory that is reserved and not touched."""
    import mmap

    size = numbers * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    area = mmap.mmap(-1, size, flags)
    return torch.frombuffer(area, dtype=torch.uint8).untyped_storage()


@pytest.mark.parametrize(
    "shape,axes,unit",
    [
        ((2, 7, 5, 40), (0, 2, 1, 3), 8),
        ((2, 5, 7, 40), (0, 1, 2, 3), 8),
        ((2, 7, 5, 36), (0, 2, 1, 3), 1),
        ((2, 5, 40, 7), (0, 1, 3, 2), 1),
        ((1, 7, 5, 72), (0, 2, 1, 3), 8),
    ],
)
def test_strides_come_in_units_of_eight(shape, axes, unit):
    tensor = torch.empty(shape).permute(axes)
    steps, constants = unit_strides("key", tensor)
    assert constants == {"KEY_UNIT": unit}
    for axis, letter in enumerate("bhn"):
        if tensor.shape[axis] > 1:
            assert steps[f"key_{letter}"] * unit == tensor.stride(axis)
    assert steps["key_d"] == tensor.stride(-1)


def test_a_launch_makes_the_device_of_its_tensors_the_current_one(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    entered, ran = [], []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    class Kernel:
        def __getitem__(self, grid):
            return lambda **_: ran.append(entered[-1:])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    with FakeTensorMode(allow_non_fake_inputs=True):
        here, there = (torch.empty(3, device=f"cuda:{index}") for index in (0, 1))
    Launch(Kernel(), (1,), {"size": 3, "absent": None, "x": there}, {}, 4, 1).run()
    assert ran == [[torch.device("cuda:1")]] and entered[-1] is None
    entered.clear()
    Launch(Kernel(), (1,), {"x": here}, {}, 4, 1).run()
    assert ran[1] == [] and entered == []


def test_plans():
    assert attention_tiles.heads_of_a_program(640, 5, 132) == 5  # VideoCrafter2: tiles enough
    assert attention_tiles.heads_of_a_program(78, 32, 132) == 5  # LTX: seven groups of heads
    assert attention_tiles.heads_of_a_program(1, 4, 132) == 1
    assert attention_tiles.heads_of_a_program(0, 4, 132) >= 1
    assert attention_tiles.capture_inside(8, 512, 128)
    assert not attention_tiles.capture_inside(64, 512, 128)  # shares would move more than queries
    assert not attention_tiles.capture_inside(8, 17776, 64)
    tile = attention_tiles.few_keys_tile(77, 64, 2)
    assert (tile.columns, tile.rest) == (64, 16)
    assert attention_tiles.few_keys_tile(129, 64, 2) is None


@pytest.mark.parametrize("head_dim", [1, 40, 64, 128, 256])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("hopper", [False, True])
def test_tiles_suit_tensor_cores(head_dim, element_size, hopper):
    tiles = [attention_tiles.forward_tile(head_dim, element_size, hopper=hopper)]
    tiles += [attention_tiles.few_keys_tile(keys, head_dim, element_size) for keys in (3, 77, 90)]
    for tile in filter(None, tiles):
        for size in (tile.rows, tile.columns, tile.rest or 16):
            assert size >= 16 and size & (size - 1) == 0
        if element_size == 2:
            assert tile.rows >= 16 * tile.warps  # no product is computed twice
