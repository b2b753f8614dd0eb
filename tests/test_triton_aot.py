"""Every default launch configuration compiles for every GPU class and is acceptable there. No GPU needed."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from importlib import resources
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 excludes compiling kernels", allow_module_level=True)

# after the skips: these import triton
from xattn_video.ops.block_lists import empty_lists  # noqa: E402
from xattn_video.ops.triton import attention_choice, block_lists, launch_tables  # noqa: E402
from xattn_video.ops.triton import selection as block_selection  # noqa: E402
from xattn_video_eval.studies import static_evidence  # noqa: E402
from xattn_video_eval.studies.static_evidence import Case  # noqa: E402
from xattn_video_eval.tune import TARGETS, compile_like_jit  # noqa: E402

CASES = list(static_evidence.default_cases())
COMPILED = [(case, target) for case in CASES for target in TARGETS if case.runs_on(target)]


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """A cached kernel would be judged instead of the present source. The workers of one run share what they compile."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(shared / "triton"))
        yield


@functools.cache
def gather(case: Case, target: str) -> static_evidence.Evidence:
    """Several tests look at the same machine code."""
    return static_evidence.gather(case, target)


@pytest.mark.parametrize(
    ("case", "target"),
    COMPILED,
    ids=[
        f"{case.kernel}-{case.dtype}-{case.head_dim}-{case.kind or case.causal}-{target}" for case, target in COMPILED
    ],
)
def test_shipped_configuration_is_accepted(case, target):
    evidence = gather(case, target)
    assert evidence.complaints() == [], static_evidence.format_row(evidence)
    if case.kind is None and case.dtype != "fp32" and target != "gfx942":
        assert evidence.async_copies > 0, "the loads are neither vectorised nor pipelined: is the specialisation lost?"


def test_every_table_entry_is_compiled():
    """Cases and targets together reach each entry of each shipped table, so none is committed unseen."""
    residual = list(static_evidence.residual_cases())
    compiled = {id(case.config(target)) for case, target in COMPILED if case not in residual}
    folder = resources.files(launch_tables.__package__).joinpath("configs")
    names = [file.name.removesuffix(".json") for file in folder.iterdir()]
    assert {"default", "gfx", "sm_90"} <= set(names)
    unseen = [
        (name, kernel, bits, limit)
        for name in names
        for kernel, widths in launch_tables.shipped_table(name).items()
        for bits, entries in widths.items()
        for limit, entry in entries.items()
        if id(entry) not in compiled
    ]
    assert unseen == []
    assert len(COMPILED) <= 60 + len(list(static_evidence.hopper_cases())) + len(residual) * len(TARGETS)


@pytest.mark.parametrize(
    "case", [Case("block_sparse", "bf16", 128, tma=False), Case("antidiagonal_scores", "bf16", 128)]
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_copies_run_beside_products(case, target):
    """At the loop's wait the copies of a later tile of keys and of one of values or queries are on their way."""
    assert gather(case, target).copies_in_flight >= 2


def test_the_scale_costs_no_instruction_of_its_own():
    """Hopper, D 128, a tile of 128 x 128 and 8 warps: 64 logits a thread, and less than 9 instructions for each.

    Of these the softmax needs 5.3 (a maximum, a multiply-add, a power, a sum, half a conversion, and rescaling the 64
    accumulators); a scale applied on its own would add 1.
    """
    evidence = gather(Case("block_sparse", "bf16", 128, tma=False), "sm_90")
    assert (evidence.config["BLOCK_M"], evidence.config["BLOCK_N"], evidence.config["num_warps"]) == (128, 128, 8)
    assert evidence.loop_instructions - evidence.loop_matrix_instructions < 9 * 64


@pytest.mark.parametrize("head_dim", [40, 72])
def test_scoring_loads_rows_that_are_not_a_multiple_of_16(head_dim):
    """Strides of 40 or 72 elements are known to be multiples of 16 bytes: vector loads, pipelined, no local loads."""
    evidence = gather(Case("antidiagonal_scores", "bf16", head_dim), "sm_80")
    assert evidence.async_copies > 0
    assert evidence.local_loads_in_loop == 0


@pytest.mark.parametrize(("stride", "block_size"), [(16, 128), (16, 64)])
def test_scoring_fills_matrix_tiles_where_blocks_have_few_rows(stride, block_size):
    """8 or 4 rows a query block: a program takes several blocks, and Hopper's 64-row instruction stays in use."""
    case = Case("antidiagonal_scores", "bf16", 128, stride=stride, block_size=block_size)
    evidence = gather(case, "sm_90")
    assert evidence.matrix_instructions > 0
    assert evidence.complaints() == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_blocks_of_64_keep_the_rules_too(target):
    """Half the rows of the default tile, and half its warps: with all, sm_120 loads spilled values in the loop."""
    evidence = gather(Case("block_sparse", "bf16", 128, block_size=64), target)
    assert evidence.complaints() == []
    assert evidence.config["num_warps"] == 4


@pytest.mark.parametrize("target", static_evidence.COPY_ENGINE)
def test_tensor_descriptors_use_the_copy_engine(target):
    """Keys and values come in whole tiles, nothing spills, and a key costs as many matrix instructions as before."""
    evidence = gather(Case("block_sparse", "bf16", 128, tma=True), target)
    assert evidence.complaints() == []
    assert evidence.tile_copies > 0
    assert evidence.local_loads_in_loop == 0
    pointers = gather(Case("block_sparse", "bf16", 128, tma=False), target)
    assert pointers.tile_copies == 0
    a_key, before = (made.loop_matrix_instructions / made.config["BLOCK_N"] for made in (evidence, pointers))
    assert a_key == before


@pytest.mark.parametrize("case", [Case("antidiagonal_scores", "bf16", 128), Case("block_sparse", "bf16", 128)])
def test_a_video_of_another_size_compiles_nothing(case, monkeypatch):
    """A kernel is compiled for a model, not for a resolution: what a short job waits for, it waits for once."""
    made = set()
    for tokens in (118_800 + 256, 75_601, 32_760):
        monkeypatch.setattr(static_evidence, "TOKENS", tokens)
        kernel, arguments = case.kernel_and_arguments("sm_90")
        made.add(compile_like_jit(kernel, arguments, TARGETS["sm_90"]).hash)
    assert len(made) == 1


def selection_kernels(blocks: int, target: str) -> list[str]:
    """Compile selection and the lists of a mask; what identifies the two."""
    scores = torch.empty(1, 24, blocks, blocks, device="meta")
    flags = scores.to(torch.int8)
    indices, counts = empty_lists(scores)
    lists = {"indices_ptr": indices, "counts_ptr": counts}
    sizes = {"heads": 24, "Nq": blocks, "Nk": blocks, **block_lists.row_options(blocks)}

    def strides(names: str) -> dict[str, int]:
        return {f"stride_{name}{axis}": scores.stride(at) for name in names for at, axis in enumerate("bhqk")}

    tensors = {"scores_ptr": scores, "valid_ptr": flags, "forced_ptr": flags}
    tensors |= {"threshold_ptr": torch.empty(24, dtype=torch.float64, device="meta"), **lists}
    calls = [
        (block_selection._block_selection_kernel, {**tensors, **strides("svf"), **sizes}),
        (block_lists._block_lists_kernel, {"mask_ptr": flags, **lists, **strides("m"), **sizes}),
    ]
    made = [compile_like_jit(*call, TARGETS[target]) for call in calls]
    assert all(compiled.metadata.shared < 16 * 1024 for compiled in made)
    return [compiled.hash for compiled in made]


@pytest.mark.parametrize("target", TARGETS)
def test_selection_compiles_once_for_lengths_of_the_same_magnitude(target):
    assert selection_kernels(931, target) == selection_kernels(592, target)


@pytest.mark.parametrize("case", list(static_evidence.residual_cases())[::3], ids=lambda case: case.kernel)
def test_a_residual_of_another_video_compiles_nothing(case, monkeypatch):
    """Nor does one of other heads: sizes and strides are no part of what a kernel is compiled for."""
    made = set()
    for tokens, heads in ((118_800 + 256, 24), (75_601, 40), (32_760, 12)):
        monkeypatch.setattr(static_evidence, "TOKENS", tokens)
        monkeypatch.setattr(static_evidence, "HEADS", heads)
        made.add(compile_like_jit(*case.kernel_and_arguments("sm_90"), TARGETS["sm_90"]).hash)
    assert len(made) == 1


@pytest.mark.parametrize("kind", ["int4", "fp8", "full"])
def test_a_residual_is_moved_in_wide_accesses(kind):
    """bf16, D 128, a half of a row is 128 bytes: all that is as large as an output moves in 16 bytes a thread."""
    merged = gather(Case("residual_merge", "bf16", 128, kind=kind), "sm_90").wide_accesses
    added = gather(Case("residual_add", "bf16", 128, kind=kind), "sm_90").wide_accesses
    # 2048 values of one half and 128 threads: two accesses for each half of a tensor of 16 bits, one for 8 bits,
    # and one for both halves of 4 bits
    stored = {"int4": 1, "fp8": 2, "full": 4}[kind]
    assert merged == 3 * 4 + stored
    assert added == 2 * 4 + stored


def test_specialisation_is_the_launchs():
    """Pointers and strides are known to be divisible by 16 and unit integers are constants, as in a launch."""
    kernel, arguments = Case("block_sparse", "bf16", 128, tma=False).kernel_and_arguments("sm_90")
    source = compile_like_jit(kernel, arguments, TARGETS["sm_90"]).src
    names = kernel.arg_names
    aligned = {names[path[0]] for path, found in source.attrs.items() if ["tt.divisibility", 16] in found}
    assert {"q_ptr", "k_ptr", "v_ptr", "output_ptr", "stride_qs", "stride_ks", "stride_vh"} <= aligned
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    assert constants["heads_per_kv"] == 1
    assert constants["kv_start_ptr"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shared": 100 * 1024}, "shared memory 102400 B is above 101376 B"),
        ({"tensor_memory_columns": 640}, "tensor memory needs 640 of 512"),
        ({"matrix_instructions": 0}, "no matrix instruction"),
        ({"local_loads_in_loop": 3}, "3 local loads"),
        ({"copies_in_flight": 0}, "waits for every copy"),
        ({"async_copies": 0, "copies_in_flight": None}, "nothing is copied while"),
        ({"serialised_products": 7}, "7 matrix instructions wait for the one before them"),
    ],
)
def test_bad_evidence_is_refused(change, words):
    good = evidence_of("sm_86", Case("block_sparse", "fp16", 64), copies_in_flight=2)
    assert good.complaints() == []
    assert words in "; ".join(dataclasses.replace(good, **change).complaints())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 2, "stack": 8}, "2 values are spilled, 8 B of stack"),
        ({"wide_accesses": 0}, "no load or store of 16 bytes"),
        ({"shared": 100 * 1024}, "shared memory 102400 B is above 101376 B"),
    ],
)
def test_bad_evidence_of_a_residual_kernel_is_refused(change, words):
    good = evidence_of("sm_86", Case("residual_add", "bf16", 128, kind="int4"), matrix_instructions=0, async_copies=0)
    assert good.complaints() == []
    assert words in "; ".join(dataclasses.replace(good, **change).complaints())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 2, "stack": 8}, "2 values are spilled, 8 B of stack"),
        ({"register_requests": 0}, "the copying warps give no registers"),
        ({"barriers_in_loops": [0, 1]}, "all warps wait for each other in the loop: [0, 1]"),
        ({"products_in_flight": 1}, "do not run at once"),
        ({"products_in_flight": None}, "do not run at once"),
    ],
)
def test_the_hopper_kernel_is_held_to_what_it_is_written_for(change, words):
    written_for = {"register_requests": 8, "barriers_in_loops": [0, 0], "products_in_flight": 2}
    hopper = evidence_of("sm_90", Case("attention_hopper", "bf16", 128), **written_for)
    assert hopper.complaints() == []
    assert words in "; ".join(dataclasses.replace(hopper, **change).complaints())
    plain = dataclasses.replace(hopper, case=Case("block_sparse", "bf16", 128), **change)
    assert plain.complaints() == []


def evidence_of(target: str, case: Case, **changes: Any) -> static_evidence.Evidence:
    """Of a kernel that has nothing wrong with it, but for the changes."""
    good = static_evidence.Evidence(
        target=target,
        case=case,
        config={},
        registers=128,
        stack=0,
        spills=0,
        shared=99 * 1024,
        tensor_memory_columns=0,
        matrix_instructions=64,
        async_copies=8,
        tile_copies=0,
        local_loads_in_loop=0,
        loop_instructions=300,
        loop_matrix_instructions=64,
        copies_in_flight=None,
        products_in_flight=None,
        serialised_products=0,
        barriers_in_loops=[2, 3],
        softmax_barriers=0,
        register_requests=0,
        wide_accesses=8,
        compile_seconds=1.0,
    )
    return dataclasses.replace(good, **changes)


def disassembly(*texts: str) -> str:
    """As cuobjdump prints it: an instruction every 16 bytes, with its address and its encoding."""
    return "\n".join(
        f"        /*{16 * at:04x}*/                   {text} ;    /* 0x000fe20000000f00 */"
        for at, text in enumerate(texts)
    )


QK = [f"HGMMA.64x128x16.F32.BF16 R24, gdesc[UR{at}], {'RZ, !UPT' if at == 8 else 'R24'}" for at in (8, 12, 16)]
PV = [f"HGMMA.64x128x16.F32.BF16 R88, R{at}, gdesc[UR4].tnspB, R88" for at in (152, 156, 160)]
SOFTMAX = ["MUFU.EX2 R5, R5", "@P3 MUFU.EX2 R6, R6"]
ARRIVE, WAIT, WAIT_FOR_FIRST = "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
ALL_WARPS, ONE_GROUP = "BAR.SYNC.DEFER_BLOCKING 0x0", "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80"


def ended(product: list[str]) -> list[str]:
    """With the mark that a wait counts on the last instruction."""
    return [*product[:-1], f"{product[-1]}, gsb0"]


def serialised(product: list[str]) -> list[str]:
    """As ptxas writes it where the sums are needed too early: each step waits for the one before."""
    return [text for step in product for text in (ARRIVE, f"{step}, gsb0", WAIT)]


@pytest.mark.parametrize(
    ("steps", "running", "serial", "barriers", "at_softmax"),
    [
        # the second product of a step still runs when the next step issues its first
        ([*ended(QK), WAIT, *SOFTMAX, *ended(PV)], 2, 0, 0, 0),
        ([*ended(QK), WAIT, *SOFTMAX, *ended(PV), WAIT], 1, 0, 0, 0),
        ([*ended(QK), ARRIVE, *ended(PV), WAIT_FOR_FIRST, ONE_GROUP, *SOFTMAX[:1], WAIT, *SOFTMAX], 2, 0, 0, 0),
        ([*ended(QK), WAIT, SOFTMAX[0], ALL_WARPS, SOFTMAX[1], *ended(PV), ALL_WARPS], 2, 0, 2, 1),
        ([ALL_WARPS, *ended(QK), WAIT, *SOFTMAX, *ended(PV), ALL_WARPS], 2, 0, 2, 0),
        # some versions of the disassembler add what the scheduler was told
        ([*ended(QK), WAIT, *SOFTMAX, f"{ALL_WARPS}    ?trans1", f"{ONE_GROUP}    ?trans1", *ended(PV)], 2, 0, 1, 1),
        # the barrier before the first instruction of a loop comes after the last
        ([ALL_WARPS, *ended(QK), *ended(PV), WAIT, *SOFTMAX], 2, 0, 1, 1),
        ([*serialised(QK), *SOFTMAX, *ended(PV)], 2, 2, 0, 0),
        ([*serialised(QK), *SOFTMAX, *serialised(PV)], 1, 4, 0, 0),
    ],
)
def test_products_and_barriers_are_read(steps, running, serial, barriers, at_softmax):
    start = ["MOV R1, c[0x0][0x28]", ALL_WARPS]
    sass = disassembly(*start, *steps, f"@P0 BRA 0x{16 * len(start):x}", ALL_WARPS, "EXIT")
    read = static_evidence.read_sass(sass, "sm_90")
    assert read["products_in_flight"] == running
    assert read["serialised_products"] == serial
    assert read["barriers_in_loops"] == [barriers]
    assert read["softmax_barriers"] == at_softmax
    assert read["loop_instructions"] == len(steps) + 1
    assert read["loop_matrix_instructions"] == len(QK + PV)


def test_a_wait_outside_the_loop_is_no_loop():
    """The first try lies in the loop, further ones behind the end, and then it goes on in the loop."""
    loop = [
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4+0x100], R6",
        "@!P1 BRA 0x80",
        *ended(QK),
        WAIT,
        "@P0 BRA 0x0",
        "EXIT",
    ]
    wait = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4+0x100], R6", "@!P1 BRA 0x80", "BRA 0x20"]
    read = static_evidence.read_sass(disassembly(*loop, *wait), "sm_90")
    assert read["barriers_in_loops"] == [0]
    assert read["loop_instructions"] == 7
    # a branch back to a place that no branch led away from closes a loop
    other = ["NOP", *ended(QK), WAIT, "NOP", "BRA 0x0"]
    assert static_evidence.read_sass(disassembly(*other), "sm_90")["loop_instructions"] == len(other)


def test_copies_spills_and_register_requests_are_read():
    read = static_evidence.read_sass(
        disassembly("STL [R1], R4", "UTMALDG.4D [UR8], [UR18]", "LDGSTS.E.BYPASS.128 [R3], desc[UR3][R2.64]", "EXIT"),
        "sm_90",
    )
    assert {name: read[name] for name in ("spills", "tile_copies", "async_copies", "register_requests")} == {
        "spills": 1,
        "tile_copies": 1,
        "async_copies": 2,
        "register_requests": 0,
    }
    assert static_evidence.read_sass(disassembly("USETMAXREG.DEALLOC.CTAPOOL 0x18"), "sm_90")["register_requests"] == 1


def test_tile_copies_cost_a_barrier_between_the_products():
    """Why the plain kernel is not refused for it: on an H100 the variant with the barrier was the faster one."""
    evidence = gather(Case("block_sparse", "bf16", 128, tma=True), "sm_90")
    assert evidence.softmax_barriers == 1
    assert evidence.products_in_flight == 2


@pytest.mark.skipif(not attention_choice.triton_suffices(), reason="needs Triton 3.6 or newer")
@pytest.mark.parametrize(
    "case", list(static_evidence.hopper_cases()), ids=lambda case: f"{case.head_dim}-{case.causal}"
)
def test_the_hopper_kernel_costs_fewer_instructions_than_the_plain_one(case):
    """A step of either is 128 keys for 128 queries; the plain one's warps also copy."""
    hopper = gather(case, "sm_90")
    assert hopper.complaints() == []
    assert hopper.tile_copies >= 4
    plain = gather(dataclasses.replace(case, kernel="block_sparse"), "sm_90")
    assert hopper.loop_instructions < plain.loop_instructions * 128 / plain.config["BLOCK_N"]


def test_a_spilling_kernel_is_seen(monkeypatch):
    """A tile far too large for its warps keeps values in local memory inside the loop, and the reader finds them."""
    tiles = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 4}
    monkeypatch.setattr(Case, "config", lambda *_: tiles)
    evidence = static_evidence.gather(Case("block_sparse", "bf16", 128), "sm_86")
    assert any("local loads" in complaint for complaint in evidence.complaints())
    assert any("shared memory" in complaint for complaint in evidence.complaints())


def test_the_program_prints_a_table_and_json(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(static_evidence, "default_cases", lambda: iter([Case("antidiagonal_scores", "fp32", 40)]))
    monkeypatch.setattr(triton.knobs.cache, "dir", triton.knobs.cache.dir)
    file = tmp_path / "rows.jsonl"
    assert static_evidence.main(["--defaults", "--target", "gfx942", "--output", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["target", "kernel", "type"]
    document = json.loads(lines[-1])
    assert document["compiled"] == 1
    assert document["rows"] == [json.loads(file.read_text())]
    assert document["rows"][0]["registers"] > 0
