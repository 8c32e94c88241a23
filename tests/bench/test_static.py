"""The reader of machine code, the model of speed and the comparison of budgets, on texts and numbers worked out by
hand.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from cvg_kernels.bench.static import model, sass
from cvg_kernels.bench.static.budgets import compare, compare_objects
from cvg_kernels.bench.static.mix import mix_of
from cvg_kernels.bench.static.model import ARCHITECTURES, Work
from cvg_kernels.bench.static.objects import ObjectRow, usage
from cvg_kernels.bench.static.work import repeated_products, work_of

# An outer loop (0x10 to 0x160) around an inner one (0x40 to 0xe0) that waits in a loop of two, laid out behind the
# end.
CODE = """
//--------------------- .text.kernel --------------------------
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0030*/              @!P1 BRA `(.L_x_4) ;
.L_x_1:
        /*0040*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64], P2 ;
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR19], R6 ;
        /*0060*/              @!P0 BRA `(.L_x_5) ;
.L_x_2:
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R56, gdesc[UR28], RZ, !UPT ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R120, R152, gdesc[UR28].tnspB, R120, gsb0 ;
        /*0090*/                   FFMA R3, R4, R5, -R6 ;
        /*00a0*/                   MUFU.EX2 R3, R3 ;
        /*00b0*/                   MUFU.RCP R3, R3 ;
        /*00c0*/               @P3 BRA `(.L_x_3) ;
        /*00d0*/                   FADD R3, R3, 1 ;
.L_x_3:
        /*00e0*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_4:
        /*00f0*/                   HMMA.16816.F32.BF16 R4, R4, R6, R8 ;
        /*0100*/                   LDSM.16.M88.4 R4, [R4] ;
        /*0110*/                   STS.64 [R4], R8 ;
        /*0120*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0130*/                   STL [R1], R0 ;
        /*0140*/                   LDL.LU R0, [R1] ;
        /*0150*/               @P2 CALL.REL.NOINC `(.L_x_6) ;
        /*0160*/                   BRA `(.L_x_0) ;
.L_x_6:
        /*0170*/                   EXIT ;
.L_x_5:
        /*0180*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR19], R6 ;
        /*0190*/              @!P0 BRA `(.L_x_5) ;
        /*01a0*/                   BRA `(.L_x_2) ;
.L_x_7:
        /*01b0*/                   BRA `(.L_x_7);
//--------------------- .text.other --------------------------
.text.other:
        /*0000*/                   FFMA R3, R4, R5, -R6 ;
"""


def test_loops_nest_and_hold_what_runs_in_them():
    (outer,) = sass.loops(CODE)
    (inner,) = outer.inner
    (wait,) = inner.inner
    assert [loop.depth for loop in (outer, inner, wait)] == [0, 1, 2]
    assert [loop.address for loop in (outer, inner, wait)] == [0x10, 0x40, 0x180]
    assert [i.address for i in wait.body] == [0x180, 0x190]
    assert [i.address for i in inner.body] == [*range(0x40, 0xF0, 0x10), 0x180, 0x190, 0x1A0]
    assert [i.address for i in outer.body] == [*range(0x10, 0x170, 0x10), 0x180, 0x190, 0x1A0]
    own = outer.without(lambda loop: mix_of(loop.body).tensor > 0)
    assert [i.address for i in own] == [0x10, 0x20, 0x30, *range(0xF0, 0x170, 0x10)]


def test_instructions_by_kind():
    whole = mix_of(sass.instructions(CODE))
    assert whole.total == 28
    assert whole.opcodes == {"HGMMA.64x128x16": 1, "HGMMA.64x64x16": 1, "HMMA.16816": 1}
    # a group of four warps shares an HGMMA; HMMA.16816 is 16 rows, 8 columns, depth 16
    assert whole.tensor_flops == 2 * 64 * (128 + 64) * 16 // 4 + 2 * 16 * 8 * 16
    assert (whole.exp2, whole.mufu, whole.fp32, whole.fma) == (1, 2, 2, 1)
    assert (whole.async_copies, whole.tma, whole.global_loads, whole.narrow_loads) == (1, 0, 2, 1)
    assert whole.global_bytes == 32 * (16 + 2 + 16)
    # LDSM of four tiles, STS.64, LDGSTS.128; HGMMA with both operands in shared memory, then with one
    assert whole.shared_bytes == 512 + 256 + 512 + 32 * (64 + 128) // 4 + 32 * 64 // 4
    assert (whole.shared, whole.barriers, whole.local, whole.setmaxreg) == (2, 1, 2, 0)


def test_other_instructions_by_kind():
    text = """
        /*0000*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
        /*0010*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0020*/                   UTCHMMA gdesc[UR10], gdesc[UR6], tmem[UR15], tmem[UR22], idesc[UR23], !UPT ;
        /*0030*/                   FFMA2 R4, R4.F32x2.HI_LO, R6.F32x2.HI_LO, R8.F32x2.HI_LO ;
        /*0040*/                   HMMA.1688.F32.TF32 R4, R4, R6, R8 ;
        /*0050*/                   LDSM.16.MT88.2 R4, [R4] ;
    """
    mix = mix_of(sass.instructions(text))
    assert (mix.setmaxreg, mix.tma, mix.tensor, mix.unsized, mix.fp32) == (1, 1, 2, True, 2)
    assert mix.tensor_flops == 2 * 16 * 8 * 8
    assert mix.shared_bytes == 256


def test_a_loop_may_be_entered_in_its_middle():
    text = """
        /*0000*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/                   FADD R3, R3, 1 ;
.L_x_2:
        /*0020*/                   FMUL R3, R3, R3 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
    """
    (loop,) = sass.loops(text)
    assert [i.address for i in loop.body] == [0x10, 0x20, 0x30] and not loop.inner


def test_text_that_is_no_code_is_refused():
    with pytest.raises(ValueError, match="no SASS instruction"):
        sass.loops("nothing\n")
    with pytest.raises(ValueError, match="nowhere"):
        sass.loops("        /*0000*/                   BRA `(.L_x_9) ;\n")
    unknown = "        /*0000*/                   HMMA.SP.F32 R4, R4, R6, R8 ;\n"
    with pytest.raises(ValueError, match=r"HMMA\.SP\.F32 is not known"):
        mix_of(sass.instructions(unknown))


def _mix(**counts):
    empty = mix_of(sass.instructions("        /*0000*/                   NOP ;\n"))
    return SimpleNamespace(
        **{name: getattr(empty, name) for name in vars(empty)} | {"tensor": 0, "unsized": False} | counts
    )


def test_model_of_the_forward_loop_of_flash_attention():
    """128 × 64 scores, D = 64, four warps, 706 instructions: 706 clocks of issue against 512 of products on H100."""
    elements = 128 * 64
    work = Work("keys", elements, 2 * elements * 128, 2 * elements * 128)
    mix = _mix(total=706, tensor=16, tensor_flops=16 * 2 * 64 * 64 * 16 // 4, mufu=68, fp32=150, shared_bytes=17280)
    said = model.modelled(mix, work, 4, ARCHITECTURES["sm_90"])
    assert said.cycles == {"tensor": 512, "issue": 706, "exp": 544, "fp32": 150, "shared": 540, "bytes": 0}
    assert (said.limit, said.repeated) == ("issue", 1)
    assert said.fraction == pytest.approx(512 / 706)
    assert said.per_element == pytest.approx(706 * 4 * 32 / elements)


def test_model_counts_useful_products_only():
    """Each product twice, and head_dim 40 padded to 64: 40 / 128 of what is executed is useful."""
    elements = 64 * 64
    work = Work("keys", elements, 2 * elements * 40, 2 * elements * 64)
    mix = _mix(total=1, tensor=8, tensor_flops=2 * 2 * elements * 64 // 8)
    said = model.modelled(mix, work, 8, ARCHITECTURES["sm_80"])
    assert (said.limit, said.repeated) == ("tensor", 2)
    assert said.fraction == pytest.approx(40 / 128)


def test_model_of_warps_that_share_a_tile_and_of_float32():
    elements = 128 * 64
    work = Work("keys", elements, 2 * elements * 128, 2 * elements * 128)
    half = _mix(total=400, tensor=8, tensor_flops=work.flops // 2 // 4)  # four warps do half the rows
    said = model.modelled(half, work, 4, ARCHITECTURES["sm_90"])
    assert said.per_element == pytest.approx(400 * 4 * 32 / (elements / 2))
    assert (said.repeated, said.fraction) == (1, pytest.approx(256 / 400))
    fma = work.flops // 2 // 32 // 4  # a lane of four warps
    said = model.modelled(_mix(total=2 * fma, fma=fma, fp32=fma), work, 4, ARCHITECTURES["sm_90"])
    assert (said.limit, said.fraction) == ("issue", pytest.approx(0.5))


def test_blocks_and_fill():
    hopper, ada = ARCHITECTURES["sm_90"], ARCHITECTURES["sm_89"]
    assert model.blocks_resident(214, 65536, 4, hopper) == 2  # 216 · 128 registers a block of 65536
    assert model.blocks_resident(32, 65536, 4, hopper) == 3  # 65 of 228 KiB
    assert model.blocks_resident(32, 0, 8, hopper) == 8  # 64 warps
    assert model.blocks_resident(32, 0, 1, hopper) == 32
    assert model.blocks_resident(32, 100 << 10, 4, ada) == 0  # 99 KiB at most
    assert model.fill(39, 132) == pytest.approx(39 / 132)
    assert model.fill(264, 132) == 1 and model.fill(0, 132) == 0
    assert model.fill(133, 132) == pytest.approx(133 / 264)


def test_work_is_told_by_the_products_of_a_loop():
    def forward_kernel():
        pass

    launch = SimpleNamespace(
        kernel=SimpleNamespace(fn=forward_kernel),
        num_warps=4,
        arguments={"tokens": 8},
        constants={
            "ROWS": 64,
            "COLUMNS": 32,
            "TOKENS_PAD": 16,
            "DIM": 40,
            "DIM_PAD": 64,
            "VALUE_DIM": 40,
            "VALUE_PAD": 64,
            "HAS_VALUE": True,
            "BAND": False,
            "HAS_TOKEN_BIAS": True,
        },
    )
    elements = 64 * 32
    assert work_of(launch, _mix(tensor=1, tensor_flops=2 * elements * 128 // 4)) == Work(
        "keys", elements, 2 * elements * 80, 2 * elements * 128
    )
    few = work_of(launch, _mix(tensor=1, tensor_flops=2 * 64 * 16 * 128 // 4))  # 8 tokens in 16 columns
    assert few == Work("tokens", 64 * 8, 2 * 64 * 8 * 80, 2 * 64 * 16 * 128)
    exact = work_of(launch, _mix(fma=64 * 32 * 128 // 32 // 4))  # float32, a lane of four warps
    assert exact.of == "keys"
    forward_kernel.__name__ = "no_such_kernel"
    assert work_of(launch, _mix()) is None


def test_products_computed_twice_show_in_the_layout():
    layout = "#mma = #ttg.nvidia_mma<{versionMajor = 3, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>\n"
    product = "%s = ttng.warp_group_dot %q, %k, %c {isAsync = true} : !a * !b -> tensor<64x64xf32, #mma> loc(#loc)\n"
    assert repeated_products(layout + product) == 2
    assert repeated_products(layout + product.replace("64x64xf32", "128x64xf32")) == 1
    columns = layout.replace("[8, 1]", "[1, 8]").replace("[16, 64, 16]", "[16, 8]")
    assert repeated_products(columns + product.replace("64x64xf32", "32x32xf32")) == 2


def _row(**figures):
    row = {
        "target": "sm_90",
        "variant": "V",
        "dtype": "bfloat16",
        "kernel": "k",
        "registers": 128,
        "spills": 0,
        "shared_bytes": 1000,
        "resident": 2,
        "fill": 1.0,
        "narrow_loads": 0,
        "repeated": 1.0,
        "specialised": 0,
        "loops": [_loop()],
    }
    return row | figures


def _loop(**figures):
    loop = {
        "instructions": 700,
        "narrow_loads": 0,
        "local": 0,
        "async_copies": 8,
        "per_element": 11.0,
        "fraction": 0.7,
        "repeated": 1.0,
    }
    return loop | figures


def test_budgets_that_stand():
    assert compare([_row()], [_row()]) == ([], [], [])


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({"registers": 129}, "registers was 128, is 129"),
        ({"spills": 1}, "spills was 0, is 1"),
        ({"resident": 1}, "resident was 2, is 1"),
        ({"loops": [_loop(per_element=11.1)]}, "loop 0: per_element was 11.0, is 11.1"),
        ({"loops": [_loop(fraction=0.69)]}, "loop 0: fraction was 0.7, is 0.69"),
        ({"loops": [_loop(async_copies=0)]}, "loop 0: async_copies was 8, is 0"),
        ({"loops": [_loop(), _loop(instructions=800)]}, "instructions was 700, is 800"),
        ({"loops": [_loop(per_element=None)]}, "per_element was 11.0, is None"),
        ({"loops": []}, "fraction was 0.7, is None"),
    ],
)
def test_budgets_that_are_broken(figures, told):
    worse, better, unknown = compare([_row(**figures)], [_row()])
    assert any(line.startswith("k of V in bfloat16 on sm_90") and told in line for line in worse), worse
    assert not better and not unknown


USAGE = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN3cvg41_GLOBAL__N__6528eed8_9_device_cu_f597000411double_eachEPi:
  REG:8 STACK:16 SHARED:32 LOCAL:4 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80
 Function _Zother:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_listing_of_the_cuda_module():
    assert usage(USAGE) == [
        ObjectRow("_ZN3cvgdevice11double_eachEPi", "sm_90", 8, 20, 32),
        ObjectRow("_Zother", "sm_80", 40, 0, 0),
    ]


def test_budgets_of_the_cuda_module():
    rows = [asdict(row) for row in usage(USAGE)]
    assert compare_objects(rows, rows) == ([], [], [])
    grown = [rows[0] | {"stack_bytes": 24}, rows[1] | {"registers": 39}]
    worse, better, unknown = compare_objects(grown, rows)
    assert worse == ["_ZN3cvgdevice11double_eachEPi on sm_90: stack_bytes was 20, is 24"]
    assert better == ["_Zother on sm_80: registers was 40, is 39"] and not unknown
    assert compare_objects(rows[:1], rows) == ([], [], [])  # built for one GPU only
    assert compare_objects([rows[0] | {"kernel": "new"}], rows).unknown == [
        "only the table has _ZN3cvgdevice11double_eachEPi on sm_90",
        "the table lacks new on sm_90",
    ]


def test_budgets_that_may_be_lowered_and_kernels_of_one_side():
    worse, better, unknown = compare([_row(spills=0, resident=3)], [_row(spills=4)])
    assert len(better) == 2 and not worse and not unknown
    _, _, unknown = compare([_row()], [_row(kernel="gone")])
    assert sorted(line.split(" k")[0].split(" gone")[0] for line in unknown) == [
        "only the table has",
        "the table lacks",
    ]


def test_the_committed_table_reads():
    from cvg_kernels.bench.static.budgets import TABLE

    table = json.loads((Path(__file__).parents[2] / TABLE).read_text())
    assert table["compilers"]["triton"] and len(table["rows"]) > 100
    assert compare(table["rows"], table["rows"]) == ([], [], [])
