"""Every default launch configuration compiles for every GPU class and is acceptable there. No GPU needed."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import resources

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 excludes compiling kernels", allow_module_level=True)

# after the skips: these import triton
from eval import static_evidence  # noqa: E402
from eval.static_evidence import Case  # noqa: E402
from xattn_video.kernels import block_lists, block_selection, launch_tables  # noqa: E402

CASES = list(static_evidence.default_cases())


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    """A cached kernel would be judged instead of the present source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("target", static_evidence.TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.dtype}-{case.head_dim}-{case.causal}")
def test_shipped_configuration_is_accepted(case, target):
    evidence = static_evidence.gather(case, target)
    assert evidence.complaints() == [], static_evidence.format_row(evidence)
    if case.dtype != "fp32" and target != "gfx942":
        assert evidence.async_copies > 0, "the loads are neither vectorised nor pipelined: is the specialisation lost?"


def test_every_table_entry_is_compiled():
    """Cases and targets together reach each entry of each shipped table, so none is committed unseen."""
    compiled = {id(case.config(target)) for case in CASES for target in static_evidence.TARGETS}
    folder = resources.files(launch_tables.__package__).joinpath("launch_configs")
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
    assert len(CASES) * len(static_evidence.TARGETS) <= 60


@pytest.mark.parametrize("case", [Case("block_sparse", "bf16", 128), Case("antidiagonal_scores", "bf16", 128)])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_copies_run_beside_products(case, target):
    """At the loop's wait the copies of a later tile of keys and of one of values or queries are on their way."""
    assert static_evidence.gather(case, target).copies_in_flight >= 2


def test_the_scale_costs_no_instruction_of_its_own():
    """Hopper, D 128, a tile of 128 x 128 and 8 warps: 64 logits a thread, and less than 9 instructions for each.

    Of these the softmax needs 5.3 (a maximum, a multiply-add, a power, a sum, half a conversion, and rescaling the 64
    accumulators); a scale applied on its own would add 1.
    """
    evidence = static_evidence.gather(Case("block_sparse", "bf16", 128), "sm_90")
    assert (evidence.config["BLOCK_M"], evidence.config["BLOCK_N"], evidence.config["num_warps"]) == (128, 128, 8)
    assert evidence.loop_instructions - evidence.loop_matrix_instructions < 9 * 64


@pytest.mark.parametrize("head_dim", [40, 72])
def test_scoring_loads_rows_that_are_not_a_multiple_of_16(head_dim):
    """Strides of 40 or 72 elements are known to be multiples of 16 bytes: vector loads, pipelined, no local loads."""
    evidence = static_evidence.gather(Case("antidiagonal_scores", "bf16", head_dim), "sm_80")
    assert evidence.async_copies > 0
    assert evidence.local_loads_in_loop == 0


@pytest.mark.parametrize(("stride", "block_size"), [(16, 128), (16, 64)])
def test_scoring_fills_matrix_tiles_where_blocks_have_few_rows(stride, block_size):
    """8 or 4 rows a query block: a program takes several blocks, and Hopper's 64-row instruction stays in use."""
    case = Case("antidiagonal_scores", "bf16", 128, stride=stride, block_size=block_size)
    evidence = static_evidence.gather(case, "sm_90")
    assert evidence.matrix_instructions > 0
    assert evidence.complaints() == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_blocks_of_64_keep_the_rules_too(target):
    """Half the rows of the default tile, and half its warps: with all, sm_120 loads spilled values in the loop."""
    evidence = static_evidence.gather(Case("block_sparse", "bf16", 128, block_size=64), target)
    assert evidence.complaints() == []
    assert evidence.config["num_warps"] == 4


@pytest.mark.parametrize("target", static_evidence.COPY_ENGINE)
def test_tensor_descriptors_use_the_copy_engine(target):
    """Keys and values come in whole tiles, nothing spills, and a key costs as many matrix instructions as before."""
    evidence = static_evidence.gather(Case("block_sparse", "bf16", 128, tma=True), target)
    assert evidence.complaints() == []
    assert evidence.tile_copies > 0
    assert evidence.local_loads_in_loop == 0
    pointers = static_evidence.gather(Case("block_sparse", "bf16", 128), target)
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
        made.add(static_evidence.compile_like_jit(kernel, arguments, static_evidence.TARGETS["sm_90"]).hash)
    assert len(made) == 1


def selection_kernels(blocks: int, target: str) -> list[str]:
    """Compile selection, with a mask and with lists, and the lists of a mask; what identifies the three."""
    scores = torch.empty(1, 24, blocks, blocks, device="meta")
    flags = scores.to(torch.int8)
    indices, counts = block_lists.empty_lists(scores)
    sizes = {"heads": 24, "Nq": blocks, "Nk": blocks, **block_lists.row_options(blocks)}
    made = []
    for lists in (False, True):
        tensors = {"scores_ptr": scores, "valid_ptr": flags, "forced_ptr": flags}
        tensors |= {"threshold_ptr": torch.empty(24, dtype=torch.float64, device="meta")}
        tensors |= {"kept_ptr": None, "indices_ptr": indices, "counts_ptr": counts} if lists else {}
        tensors |= {} if lists else {"kept_ptr": flags, "indices_ptr": None, "counts_ptr": None}
        strides = {f"stride_{name}{axis}": scores.stride(at) for name in "svf" for at, axis in enumerate("bhqk")}
        compiled = static_evidence.compile_like_jit(
            block_selection._block_selection_kernel,
            {**tensors, **strides, **sizes, "LISTS": lists},
            static_evidence.TARGETS[target],
        )
        assert compiled.metadata.shared < 16 * 1024
        made.append(compiled.hash)
    strides = {f"stride_m{axis}": scores.stride(at) for at, axis in enumerate("bhqk")}
    tensors = {"mask_ptr": flags, "indices_ptr": indices, "counts_ptr": counts}
    arguments = {**tensors, **strides, **sizes}
    kernel = block_lists._block_lists_kernel
    return [*made, static_evidence.compile_like_jit(kernel, arguments, static_evidence.TARGETS[target]).hash]


@pytest.mark.parametrize("target", static_evidence.TARGETS)
def test_selection_compiles_once_for_lengths_of_the_same_magnitude(target):
    assert selection_kernels(931, target) == selection_kernels(592, target)


def test_specialisation_is_the_launchs():
    """Pointers and strides are known to be divisible by 16 and unit integers are constants, as in a launch."""
    kernel, arguments = Case("block_sparse", "bf16", 128).kernel_and_arguments("sm_90")
    source = static_evidence.compile_like_jit(kernel, arguments, static_evidence.TARGETS["sm_90"]).src
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
    ],
)
def test_bad_evidence_is_refused(change, words):
    good = static_evidence.Evidence(
        target="sm_86",
        case=Case("block_sparse", "fp16", 64),
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
        copies_in_flight=2,
        compile_seconds=1.0,
    )
    assert good.complaints() == []
    assert words in "; ".join(dataclasses.replace(good, **change).complaints())


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
