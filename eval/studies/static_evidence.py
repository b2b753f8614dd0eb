"""What the Triton kernels compile to, without a GPU: `python -m xattn_video_eval.studies.static_evidence`.

Every kernel is compiled ahead of time with the specialisation that the JIT would give it (the launcher's own arguments
on tensors of real size that hold no memory), and the machine code is read: registers, stack, shared and tensor memory,
matrix instructions, what else the innermost loop around them holds, local loads in it, whether its copies run beside
its products, whether its products wait for each other, and where its warps do. One line per kernel; the last line of
stdout is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from xattn_video.ops.key_mask import num_blocks
from xattn_video.ops.residual import RESIDUALS, empty_packed
from xattn_video.ops.triton import attention, attention_choice, launch_tables, residual
from xattn_video.ops.triton import scores as antidiagonal_scores
from xattn_video.ops.triton.launch_tables import LaunchConfig
from xattn_video_eval.results import provenance
from xattn_video_eval.tune import TARGETS, compile_like_jit
from xattn_video_pipelines.common import jsonl
from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import write_texts
from xattn_video_pipelines.common.program import Parser, run_program
from xattn_video_pipelines.common.settings import Settings

# shared memory a block may use, KiB
SHARED_LIMIT = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
MATRIX_INSTRUCTION = {
    "sm_80": r"\bHMMA\b",
    "sm_86": r"\bHMMA\b",
    "sm_90": r"\bHGMMA\b",
    "sm_100": r"\bUTC\w*MMA\b",
    "sm_120": r"\bHMMA\b",
    "gfx942": r"\bv_mfma_",
}
TENSOR_MEMORY_COLUMNS = 512
# what a configuration needs to fetch whole tiles by tensor descriptors; where memory is small, a smaller tile too
COPY_ENGINE = {"sm_90": {"TMA": 1}, "sm_100": {"TMA": 1}, "sm_120": {"TMA": 1, "BLOCK_N": 32}}
LOCAL_LOAD = {"cuda": r"\bLDL\b", "hip": r"\bscratch_load"}
EXPONENTIAL = {"cuda": r"\bMUFU\.EX2\b", "hip": r"\bv_exp_f32"}
# A barrier of all threads of a program; one of a single warpgroup names it and says how many threads it is for.
BARRIER = {"cuda": r"\bBAR\.SYNC\S* 0x[0-9a-f]+\b(?!,)", "hip": r"\bs_barrier\b"}
# Hopper's products run asynchronously: gsb0 marks the last instruction of what a later wait counts as one product.
ASYNC_PRODUCT = r"\bHGMMA\S* (R\d+)\b.*?(, gsb0)?\s*$"
ASYNC_WAIT = r"\bWARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)"
# of 16 bytes for each thread: global memory is read and written best by them
WIDE_ACCESS = {
    "cuda": r"\b(?:LDG|STG)\S*\.128\b",
    "hip": r"^\s*(?:global|buffer)_(?:load|store)_dwordx4\b",
}
TILES = ("BLOCK_R", "BLOCK_C", "BLOCK_K", "BLOCK_M", "BLOCK_N", "BLOCK_S", "BLOCK_D")
CONFIG_NAMES = (*TILES, "TMA", "STAGES", "num_warps", "num_stages")
HOPPER = "attention_hopper"
MERGE, ADD, EXTRAPOLATE = RESIDUAL_KERNELS = ("residual_merge", "residual_add", "residual_extrapolate")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# HunyuanVideo, 720p, 129 frames: video and text tokens, heads
TOKENS, HEADS = 118_800 + 256, 24


@dataclasses.dataclass(frozen=True)
class Case:
    """One specialisation of one kernel: "antidiagonal_scores", "block_sparse", "attention_hopper" or a residual one.

    tma: whether keys and values are fetched through tensor descriptors; None is what the launch table says.
    kind: how a residual kernel's residual is stored; None for the others.
    """

    kernel: str
    dtype: str
    head_dim: int
    causal: bool = False
    block_size: int = 128
    stride: int = 8
    tma: bool | None = None
    kind: str | None = None

    def runs_on(self, target: str) -> bool:
        """Whether GPUs of that class have what the kernel is made for."""
        if self.kernel == HOPPER:
            return target == "sm_90"
        return not self.tma or target in COPY_ENGINE

    def config(self, target: str) -> LaunchConfig:
        """The configuration that comes with the package for that device class."""
        table = launch_tables.packaged_table(target)
        own = launch_tables.lookup(table, self.kernel, launch_tables.width(DTYPES[self.dtype]), self.head_dim)
        if self.tma is None:
            return own
        return {**own, **COPY_ENGINE[target]} if self.tma else {name: own[name] for name in own if name != "TMA"}

    def kernel_and_arguments(self, target: str) -> tuple[JITFunction, dict[str, Any]]:
        """The kernel and what its launcher would pass for one large video on that device class."""
        dtype = DTYPES[self.dtype]
        if self.kind is not None:
            return self._residual_kernel_and_arguments(self.kind)
        query = _meta(1, TOKENS, HEADS, self.head_dim, dtype=dtype).transpose(1, 2)
        blocks = num_blocks(TOKENS, self.block_size)
        options: dict[str, Any] = {
            "block_size": self.block_size,
            "causal": self.causal,
            "scale": self.head_dim**-0.5,
            "kv_start": _meta(1, dtype=torch.int32) if self.causal else None,
            "kv_lens": _meta(1, dtype=torch.int32),
            "config": self.config(target),
        }
        if self.kernel == "antidiagonal_scores":
            scores = _meta(1, HEADS, blocks, blocks, dtype=torch.float32)
            _, arguments = antidiagonal_scores.scores_arguments(query, query, scores, stride=self.stride, **options)
            return antidiagonal_scores._antidiagonal_scores_kernel, arguments
        lse = _meta(1, HEADS, TOKENS, dtype=torch.float32)
        indices = _meta(1, HEADS, blocks, blocks, dtype=torch.int32)
        counts = _meta(1, HEADS, blocks, dtype=torch.int32)
        tensors = (query, query, query, query, lse, indices, counts)
        if self.kernel == HOPPER:
            # needs a newer Triton than the others
            from xattn_video.ops.triton import attention_hopper

            options |= {"kv_start": None, "kv_lens": None if self.causal else options["kv_lens"]}
            return attention_hopper._attend_hopper_kernel, attention_hopper.hopper_arguments(*tensors, **options)[1]
        return attention._block_sparse_kernel, attention.block_sparse_arguments(*tensors, **options)[1]

    def _residual_kernel_and_arguments(self, kind: str) -> tuple[JITFunction, dict[str, Any]]:
        output = _meta(1, TOKENS, HEADS, self.head_dim, dtype=DTYPES[self.dtype]).transpose(1, 2)
        packed = empty_packed(output, kind)
        if self.kernel == MERGE:
            lse = _meta(1, HEADS, TOKENS, dtype=torch.float32)
            _, arguments = residual.merge_arguments(output, lse, output, lse, output, packed)
            return residual._residual_merge_kernel, arguments
        before, factor = (packed, _meta(dtype=torch.float32)) if self.kernel == EXTRAPOLATE else (None, None)
        return residual._residual_add_kernel, residual.add_arguments(output, packed, before, factor, output)[1]


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one compiled kernel shows; registers and stack are those of one thread, memory is in bytes.

    The loop is the shortest of those around matrix instructions that hold no other: the one without masks.

    copies_in_flight: groups of copies into shared memory that its wait leaves running while it multiplies; None where
        it waits in another way (tile copies, AMD) or copies nothing.
    products_in_flight: most products that run at once in the loop, where they are asynchronous (sm_90), else None.
    serialised_products: steps of products in any of the loops that wait for the step before, sm_90 only.
    barriers_in_loops: how often all threads of the program wait for each other in each of the loops, shortest first.
    softmax_barriers: those of the loop that lie between the two products, beside the exponentials.
    register_requests: instructions by which warps give registers to other warps.
    wide_accesses: loads and stores of global memory that move 16 bytes for each thread.
    """

    target: str
    case: Case
    config: dict[str, int]
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_memory_columns: int
    matrix_instructions: int
    async_copies: int
    tile_copies: int
    local_loads_in_loop: int
    loop_instructions: int
    loop_matrix_instructions: int
    copies_in_flight: int | None
    products_in_flight: int | None
    serialised_products: int
    barriers_in_loops: list[int]
    softmax_barriers: int
    register_requests: int
    wide_accesses: int
    compile_seconds: float

    @property
    def stages(self) -> int:
        """How many tiles of keys there is room for; 1 for a kernel without a loop."""
        return self.config.get("STAGES") or self.config.get("num_stages", 1)

    def complaints(self) -> list[str]:
        """Why the configuration is not acceptable on its target; empty if it is."""
        found = []
        limit = SHARED_LIMIT[self.target] * 1024
        if self.shared > limit:
            found.append(f"shared memory {self.shared} B is above {limit} B")
        if self.case.kind is not None:
            return found + self._residual_complaints()
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(f"tensor memory needs {self.tensor_memory_columns} of {TENSOR_MEMORY_COLUMNS} columns")
        # float32 is multiplied exactly, which NVIDIA's matrix units cannot do
        if self.matrix_instructions == 0 and self.case.dtype != "fp32":
            found.append(f"no matrix instruction {MATRIX_INSTRUCTION[self.target]}")
        if self.local_loads_in_loop and self.case.dtype != "fp32" and self.case.head_dim in (64, 128):
            found.append(f"{self.local_loads_in_loop} local loads in the inner loop")
        # three stages of wider heads do not fit; rows of others are not known to be aligned
        if TARGETS[self.target].backend == "cuda" and self.case.dtype != "fp32" and self.case.head_dim in (64, 96, 128):
            if self.async_copies == 0:
                found.append("nothing is copied while something is multiplied")
            elif self.copies_in_flight == 0:
                found.append("the loop waits for every copy before it multiplies")
        if self.case.tma and not self.tile_copies:
            found.append("asked for tensor descriptors, and the copy engine is not used")
        if self.serialised_products:
            found.append(f"{self.serialised_products} matrix instructions wait for the one before them")
        return found + (self._hopper_complaints() if self.case.kernel == HOPPER else [])

    def _residual_complaints(self) -> list[str]:
        """Kernels that are bound by memory: no spilled value, and wide accesses where halves of rows allow them."""
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} values are spilled, {self.stack} B of stack")
        if self.wide_accesses == 0 and self.case.head_dim in (64, 96, 128):
            found.append("no load or store of 16 bytes")
        return found

    def _hopper_complaints(self) -> list[str]:
        """What the warp-specialised kernel is written for.

        The plain kernel is not held to its barriers: with tile copies Triton puts one of all threads before the second
        product, and on an H200 that variant was the faster one all the same.
        """
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} values are spilled, {self.stack} B of stack")
        if not self.register_requests:
            found.append("the copying warps give no registers to the others")
        if any(self.barriers_in_loops):
            found.append(f"all warps wait for each other in the loop: {self.barriers_in_loops}")
        if (self.products_in_flight or 0) < 2:
            found.append("the two products of a step do not run at once")
        return found

    def row(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields.pop("case").__dict__, **fields, "complaints": self.complaints()}


def gather(case: Case, target: str) -> Evidence:
    """Compile one case for one target and read the machine code."""
    kernel, arguments = case.kernel_and_arguments(target)
    started = time.process_time()
    compiled = compile_like_jit(kernel, arguments, TARGETS[target])
    seconds = time.process_time() - started
    read = _read_amd if TARGETS[target].backend == "hip" else _read_nvidia
    config = {name: value for name, value in arguments.items() if name in CONFIG_NAMES}
    return Evidence(
        target=target,
        case=case,
        config=config,
        shared=compiled.metadata.shared,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        compile_seconds=round(seconds, 2),
        **read(compiled, target),
    )


def _read_nvidia(compiled: CompiledKernel, target: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": resources["REG"],
        "stack": resources["STACK"] + resources["LOCAL"],
        **read_sass(sass, target),
    }


def read_sass(sass: str, target: str) -> dict[str, Any]:
    """The fields of `Evidence` that the disassembly of an NVIDIA kernel shows."""
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass, flags=re.MULTILINE)
    ]
    branches = [
        (address, int(branch.group(1), 16))
        for address, text in code
        if (branch := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))
    ]
    # A wait that does not succeed at once goes on behind the kernel's end, and from there back to the place that it
    # left: that branch closes no loop.
    before = {goal: address for (address, _), (goal, _) in itertools.pairwise(code)}
    closes = [
        (goal, address)
        for address, goal in branches
        if goal < address and not any(at == before.get(goal) and goal < to <= address for at, to in branches)
    ]
    return {
        "spills": len(re.findall(r"\bSTL\b", sass)),
        # of single rows into shared memory, and of whole tiles by the copy engine
        "async_copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", sass)),
        "tile_copies": len(re.findall(r"\bUTMALDG\b", sass)),
        "register_requests": len(re.findall(r"\bUSETMAXREG\b", sass)),
        "wide_accesses": _count(WIDE_ACCESS["cuda"], [text for _, text in code]),
        **_matrix_loops(code, closes, target),
    }


def _read_amd(compiled: CompiledKernel, target: str) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]
    lines = list(enumerate(assembly.splitlines()))
    labels = {match.group(1): line for line, text in lines if (match := re.match(r"(\.?\w+):", text))}
    # not directives and comments
    code = [(line, text) for line, text in lines if re.match(r"\s+[a-z]", text)]
    backward = [
        (labels[branch.group(1)], line)
        for line, text in code
        if (branch := re.search(r"\bs_c?branch\w*\s+(\.?\w+)", text)) and labels.get(branch.group(1), line) < line
    ]
    counts = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, flags=re.MULTILINE)}
    return {
        "registers": counts["vgpr_count"],
        "stack": counts["private_segment_fixed_size"],
        "spills": counts["vgpr_spill_count"] + counts["sgpr_spill_count"],
        "async_copies": 0,
        "tile_copies": 0,
        "register_requests": 0,
        "wide_accesses": _count(WIDE_ACCESS["hip"], [text for _, text in code]),
        **_matrix_loops(code, backward, target),
    }


def _matrix_loops(code: list[tuple[int, str]], backward: list[tuple[int, int]], target: str) -> dict[str, Any]:
    """Matrix instructions in all, and what the innermost loops around them hold."""
    matrix = [address for address, text in code if re.search(MATRIX_INSTRUCTION[target], text)]
    around = [(low, high) for low, high in backward if any(low <= address <= high for address in matrix)]
    loops = [loop for loop in around if not any(other != loop and _inside(other, loop) for other in around)]
    texts = sorted(([text for address, text in code if low <= address <= high] for low, high in loops), key=len)
    backend = TARGETS[target].backend
    fast = texts[0] if texts else []
    waits = [int(wait.group(1), 16) for text in fast if (wait := re.search(r"\bDEPBAR\.LE SB0, (0x[0-9a-f]+)", text))]
    copies = any(re.search(r"\bLDGSTS\b", text) for text in fast)
    return {
        "matrix_instructions": len(matrix),
        "local_loads_in_loop": sum(_count(LOCAL_LOAD[backend], loop) for loop in texts),
        "loop_instructions": len(fast),
        "loop_matrix_instructions": _count(MATRIX_INSTRUCTION[target], fast),
        "copies_in_flight": min(waits, default=None) if copies else None,
        "products_in_flight": _products_in_flight(fast),
        "serialised_products": sum(map(_serialised_products, texts)),
        "barriers_in_loops": [_count(BARRIER[backend], loop) for loop in texts],
        "softmax_barriers": _count(BARRIER[backend], _softmax(fast, target)),
    }


def _count(pattern: str, texts: list[str]) -> int:
    return sum(bool(re.search(pattern, text)) for text in texts)


def _products_in_flight(loop: list[str]) -> int | None:
    """Most asynchronous products that run at once, None without any; those of the step before may still run."""
    running = most = 0
    for text in loop * 2:
        if product := re.search(ASYNC_PRODUCT, text):
            running += bool(product.group(2))
            most = max(most, running)
        elif wait := re.search(ASYNC_WAIT, text):
            running = min(running, int(wait.group(1), 16))
    return most or None


def _serialised_products(loop: list[str]) -> int:
    """Matrix instructions that are marked as the end of a product although the next one goes on with its sums."""
    products = [found.groups() for text in loop if (found := re.search(ASYNC_PRODUCT, text))]
    return sum(bool(end) and sums == following for (sums, end), (following, _) in itertools.pairwise(products))


def _softmax(loop: list[str], target: str) -> list[str]:
    """What lies between the two matrix instructions with the most exponentials between them; empty if none has any."""
    exponential = EXPONENTIAL[TARGETS[target].backend]
    parts: list[list[str]] = [[]]
    for text in loop:
        if re.search(MATRIX_INSTRUCTION[target], text):
            parts.append([])
        parts[-1].append(text)
    # the last part goes on at the loop's beginning
    first = parts.pop(0)
    if parts:
        parts[-1] += first
    best = max(parts, key=lambda part: _count(exponential, part), default=[])
    return best if _count(exponential, best) else []


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _cuobjdump(option: str, cubin: Path) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def default_cases() -> Iterator[Case]:
    """Every entry of the tables that come with the package, on some target: what the tests compile."""
    yield Case("antidiagonal_scores", "bf16", 64)
    yield Case("antidiagonal_scores", "bf16", 128, causal=True)
    yield Case("antidiagonal_scores", "fp32", 128)
    for head_dim in (48, 64, 96, 128, 256):
        yield Case("block_sparse", "bf16" if head_dim != 64 else "fp16", head_dim, causal=head_dim == 128)
    for head_dim in (128, 256):
        yield Case("block_sparse", "fp32", head_dim)
    yield from hopper_cases()
    yield from residual_cases()


def residual_cases() -> Iterator[Case]:
    """The kernels of residual memory: every kind of residual, and each head dimension and dtype with one of them."""
    for kernel in RESIDUAL_KERNELS:
        for kind in RESIDUALS:
            yield Case(kernel, "bf16", 128, kind=kind)
    yield Case(MERGE, "fp16", 40, kind="int4")
    yield Case(MERGE, "fp32", 256, kind="fp8")


def hopper_cases() -> Iterator[Case]:
    """The kernel for sm_90 alone, if this Triton can compile it."""
    if attention_choice.triton_suffices():
        yield Case(HOPPER, "bf16", 128)
        yield Case(HOPPER, "fp16", 64, causal=True)


def all_cases() -> Iterator[Case]:
    """The defaults over head dimensions, dtypes, strides, block sizes and both maskings."""
    kernels = ("antidiagonal_scores", "block_sparse")
    for head_dim, causal, kernel in itertools.product((40, 64, 96, 128, 256), (False, True), kernels):
        yield Case(kernel, "bf16", head_dim, causal)
    for head_dim, dtype, kernel in itertools.product((64, 128), ("fp16", "fp32"), kernels):
        yield Case(kernel, dtype, head_dim)
    yield Case("block_sparse", "fp32", 256)
    for stride, block_size in ((4, 128), (16, 128), (32, 128), (4, 64), (16, 64)):
        yield Case("antidiagonal_scores", "bf16", 128, block_size=block_size, stride=stride)
    for head_dim in (64, 128):
        yield Case("block_sparse", "bf16", head_dim, block_size=64)
        yield Case("block_sparse", "bf16", head_dim, tma=True)
        yield Case("block_sparse", "bf16", head_dim, tma=False)
    yield from residual_cases()
    yield from hopper_cases()
    if attention_choice.triton_suffices():
        yield Case(HOPPER, "bf16", 64)
        yield Case(HOPPER, "bf16", 128, causal=True)


HEADER = (
    f"{'target':7} {'kernel':25} {'type':4} {'D':>3} {'causal':6} {'P':>3} {'S':>2} {'tiles':>14} {'warps':>5}"
    f" {'stg':>3} {'regs':>4} {'stack':>5} {'spill':>5} {'shared':>6} {'tmem':>4} {'mma':>4} {'LDL':>3}"
    f" {'loop':>4} {'mma':>4} {'ahead':>5} {'prod':>4} {'bars':>5} {'soft':>4} {'wide':>4} {'s':>4}"
)


def format_row(evidence: Evidence) -> str:
    """One line of the table under HEADER."""
    case = evidence.case
    name = f"{case.kernel} {case.kind or ''}"
    tiles = "x".join(str(size) for part, size in evidence.config.items() if part.startswith("BLOCK_"))
    return (
        f"{evidence.target:7} {name:25} {case.dtype:4} {case.head_dim:3} {case.causal!s:6} {case.block_size:3} "
        f"{case.stride:2} {tiles:>14} {evidence.config['num_warps']:5} {evidence.stages:3} "
        f"{evidence.registers:4} {evidence.stack:5} {evidence.spills:5} {evidence.shared:6} "
        f"{evidence.tensor_memory_columns:4} {evidence.matrix_instructions:4} {evidence.local_loads_in_loop:3} "
        f"{evidence.loop_instructions:4} {evidence.loop_matrix_instructions:4} "
        f"{'-' if evidence.copies_in_flight is None else evidence.copies_in_flight:>5} "
        f"{evidence.products_in_flight or '-':>4} {'/'.join(map(str, evidence.barriers_in_loops)):>5} "
        f"{evidence.softmax_barriers:4} {evidence.wide_accesses:4} "
        f"{evidence.compile_seconds:4.1f}  {'; '.join(evidence.complaints())}"
    )


def run(cases: Iterable[Case], targets: Iterable[str]) -> list[Evidence]:
    """Compile every case for every target, printing a line for each."""
    print(HEADER)
    gathered = []
    for case, target in itertools.product(cases, targets):
        if not case.runs_on(target):
            continue
        evidence = gather(case, target)
        print(format_row(evidence), flush=True)
        gathered.append(evidence)
    return gathered


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvidenceSettings(Settings):
    """What is compiled: only the cases of the tests or all, for some targets or (empty) all; and a file of the rows."""

    defaults: bool = False
    target: tuple[str, ...] = ()
    output: Path | None = None


def main(argv: list[str] | None = None) -> int:
    """Run as a program: 0, 1 if a kernel is not acceptable, 2 for bad input."""
    # It runs where torch and triton are, and not the library that makes options from settings.
    parser = Parser(
        prog="python -m xattn_video_eval.studies.static_evidence",
        description="Compile the Triton kernels for GPUs that are not here and read what they became.",
        epilog="example: python -m xattn_video_eval.studies.static_evidence --defaults --target sm_90 --target gfx942",
    )
    parser.add_argument("--defaults", action="store_true", help="only the cases that the tests compile")
    parser.add_argument("--target", action="append", choices=TARGETS, default=[], help="may be repeated; default: all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the rows there, one JSON line each")

    def call(given: argparse.Namespace) -> int:
        settings = EvidenceSettings(defaults=given.defaults, target=tuple(given.target), output=given.output)
        return static_evidence(settings)

    return run_program(parser, call, argv)


def static_evidence(settings: EvidenceSettings) -> int:
    """Compile and print; 0, or 1 if a kernel is not acceptable. Raises UserError."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    # fresh compilations: a cached kernel would show another version's code
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        cases = default_cases() if settings.defaults else all_cases()
        gathered = run(cases, settings.target or TARGETS)
    source = provenance("triton")
    rows = [{**evidence.row(), **source} for evidence in gathered]
    if settings.output:
        write_texts({settings.output: jsonl.text(rows)})
    rejected = sum(bool(row["complaints"]) for row in rows)
    print(f"{len(rows)} kernels compiled, {rejected} not acceptable")
    print(json.dumps({"compiled": len(rows), "rejected": rejected, "rows": rows}))
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
