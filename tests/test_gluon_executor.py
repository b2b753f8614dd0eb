"""The Hopper kernel's own source on a CPU: right results, and mistakes in it that must be caught."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux only")

import xattn_video.ops.triton
from tests.gluon_executor import (
    BarrierError,
    Deadlock,
    MissingFence,
    OutOfBounds,
    ProtocolError,
    Race,
    launch,
    load_kernels,
)
from tests.kernel_checks import Problem, check_listed_attention

FP16, BF16 = torch.float16, torch.bfloat16
NAME = "xattn_video.ops.triton.attention_hopper"
SOURCE = (Path(xattn_video.ops.triton.__file__).parent / "attention_hopper.py").read_text()

# block_size 128 and head_dim 64 or 128 are what the kernel takes
PROBLEMS = [
    Problem(block_size=128, lengths=(300, 700), heads=(2, 1), batch=2, head_dim=64, dtype=FP16, kv_lens=(700, 391)),
    Problem(block_size=128, lengths=(390, 1100), head_dim=128, dtype=BF16, layout="bshd"),
    Problem(block_size=128, lengths=(384, 640), heads=(2, 1), head_dim=128, dtype=FP16, causal=True, layout="bshd"),
    Problem(block_size=128, lengths=(333, 461), head_dim=64, dtype=BF16, causal=True, batch=2),
    Problem(
        block_size=128,
        lengths=(200, 300),
        heads=(4, 2),
        head_dim=64,
        dtype=BF16,
        batch=2,
        kv_lens=(0, 260),
        layout="slice",
    ),
    Problem(block_size=128, lengths=(77, 640), head_dim=128, dtype=BF16, batch=2, kv_lens=(256, 50), layout="bshd"),
    Problem(block_size=128, lengths=(130, 50), heads=(3, 1), head_dim=128, dtype=FP16),
]


def check(source: str, problem: Problem, *, stages: int, seed: int) -> None:
    """Run a source of the kernel. Raises ProtocolError, or AssertionError if the result is wrong."""
    kernels = load_kernels(source, NAME)

    def launch_on_cpu(query: Tensor, key: Tensor, value: Tensor, output: Tensor, *outputs_and_lists: Tensor, **options):
        # the package gives the kernel an output in the layout of the query
        laid_out = torch.full_like(query, torch.nan)
        grid, arguments = kernels["hopper_arguments"](query, key, value, laid_out, *outputs_and_lists, **options)
        launch(kernels["_attend_hopper_kernel"], grid, arguments, seed=seed)
        output.copy_(laid_out)

    check_listed_attention(problem, "cpu", launch_on_cpu, {"num_stages": stages})


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernel_against_float64(problem, stages):
    check(SOURCE, dataclasses.replace(problem, seed=stages), stages=stages, seed=stages)


# With this seed the list has seven blocks, several rounds of two stages, and begins with the block that kv_lens cuts.
MISTAKE_PROBLEM = Problem(
    block_size=128, lengths=(140, 1240), heads=(1, 1), head_dim=64, dtype=BF16, kv_lens=(1210,), seed=22
)
MISTAKE_SEEDS = 12
WRONG_RESULT = AssertionError
ANYTHING = (ProtocolError, WRONG_RESULT)


def check_mistake_problem(source: str, seed: int) -> None:
    check(source, MISTAKE_PROBLEM, stages=2, seed=seed)


def test_problem_of_the_mistakes_without_one():
    for seed in range(MISTAKE_SEEDS):
        check_mistake_problem(SOURCE, seed)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """`old` must occur exactly once in the source. `caught_as` is what it shows as, where no chance decides that."""

    name: str
    old: str
    new: str
    caught_as: tuple[type[Exception], ...] = ANYTHING

    def plant(self) -> str:
        assert SOURCE.count(self.old) == 1, "the kernel has changed: plant this mistake where it belongs now"
        return SOURCE.replace(self.old, self.new)


MISTAKES = [
    # a missing arrive
    Mistake(
        "the loop never releases a key stage",
        "            s = warpgroup_mma_wait(num_outstanding=1, deps=(s_token,))\n"
        "            mbarrier.arrive(k_empty.index(stage), count=1)\n",
        "            s = warpgroup_mma_wait(num_outstanding=1, deps=(s_token,))\n",
        (Deadlock,),
    ),
    Mistake(
        "the loop never releases a value stage",
        "            mbarrier.arrive(v_empty.index(prior), count=1)\n",
        "",
        (Deadlock,),
    ),
    Mistake(
        "the producer does not say that it has stored a cut value tile",
        "                    mbarrier.arrive(v_full.index(stage), count=1)\n",
        "",
        (Deadlock,),
    ),
    Mistake(
        "only one consumer releases key stages",
        "            mbarrier.arrive(k_empty.index(stage), count=1)\n            acc",
        "            mbarrier.arrive(k_empty.index(stage), count=1, pred=GROUP == 0)\n            acc",
        (Deadlock,),
    ),
    # a wrong phase
    Mistake(
        "the producer takes every stage for full at first",
        "            phase = ((step // STAGES) & 1) ^ 1\n",
        "            phase = (step // STAGES) & 1\n",
        (Deadlock,),
    ),
    Mistake(
        "the producer's phase changes every step",
        "            phase = ((step // STAGES) & 1) ^ 1\n",
        "            phase = (step & 1) ^ 1\n",
    ),
    Mistake(
        "the consumer waits for the key tile's other phase",
        "mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)",
        "mbarrier.wait(k_full.index(stage), ((step // STAGES) & 1) ^ 1)",
    ),
    Mistake(
        "the consumer waits for the first round of value tiles in every round",
        "mbarrier.wait(v_full.index(prior), ((step - 1) // STAGES) & 1)",
        "mbarrier.wait(v_full.index(prior), 0)",
    ),
    Mistake(
        "the consumer waits for the last value tile's other phase",
        "mbarrier.wait(v_full.index(last), ((count - 1) // STAGES) & 1)",
        "mbarrier.wait(v_full.index(last), (((count - 1) // STAGES) & 1) ^ 1)",
    ),
    # a stage released early
    Mistake(
        "the first key stage is released while the product reads it",
        "        s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))\n"
        "        mbarrier.arrive(k_empty.index(0), count=1)\n",
        "        mbarrier.arrive(k_empty.index(0), count=1)\n"
        "        s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))\n",
        (Race,),
    ),
    Mistake(
        "a value stage is released while the product reads it",
        "            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc_token,))\n"
        "            mbarrier.arrive(v_empty.index(prior), count=1)\n",
        "            mbarrier.arrive(v_empty.index(prior), count=1)\n"
        "            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc_token,))\n",
        (Race,),
    ),
    Mistake(
        "the producer does not wait for an empty key stage",
        "            mbarrier.wait(k_empty.index(stage), phase)\n",
        "",
    ),
    Mistake(
        "the producer does not wait for an empty value stage",
        "            mbarrier.wait(v_empty.index(stage), phase)\n",
        "",
    ),
    # a wrong byte count
    Mistake(
        "too few bytes of a key tile",
        "mbarrier.expect(k_full.index(stage), TILE_BYTES)",
        "mbarrier.expect(k_full.index(stage), TILE_BYTES // 2)",
        (BarrierError,),
    ),
    Mistake(
        "too many bytes of a key tile",
        "mbarrier.expect(k_full.index(stage), TILE_BYTES)",
        "mbarrier.expect(k_full.index(stage), TILE_BYTES + 2)",
        (Deadlock,),
    ),
    Mistake(
        "the bytes of one query tile for two",
        "mbarrier.expect(q_full, 2 * _ROWS * D * 2)",
        "mbarrier.expect(q_full, _ROWS * D * 2)",
    ),
    # a missing fence
    Mistake(
        "no fence after the stores of a cut value tile",
        "    fence_async_shared()\n    _barrier()\n",
        "    _barrier()\n",
        (MissingFence,),
    ),
    Mistake(
        "no fence after the barriers are initialised",
        "    fence_async_shared()\n    # fmt: off\n",
        "    # fmt: off\n",
        (MissingFence,),
    ),
    # a wrong stage
    Mistake(
        "key tiles go to the next stage",
        "k_full.index(stage), k_tiles.index(stage), K_INSIDE",
        "k_full.index(stage), k_tiles.index((step + 1) % STAGES), K_INSIDE",
    ),
    Mistake(
        "the consumer multiplies by the value tile of the next stage",
        "v = v_tiles.index(prior)",
        "v = v_tiles.index(stage)",
    ),
    Mistake(
        "the wrong barrier is told of a key tile",
        "first_key, k_full.index(stage), k_tiles",
        "first_key, v_full.index(stage), k_tiles",
        (BarrierError,),
    ),
    Mistake(
        "both query tiles are the first",
        "first_query + _ROWS, q_full",
        "first_query, q_full",
        (WRONG_RESULT,),
    ),
    Mistake(
        "the next entry of the list is read one step late",
        "gl.maximum(count - 2 - step, 0)",
        "gl.maximum(count - 1 - step, 0)",
        (WRONG_RESULT,),
    ),
    # a missing wait for a copy or a product
    Mistake(
        "no wait for a key tile",
        "            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)\n",
        "",
    ),
    Mistake(
        "no wait for a value tile",
        "            mbarrier.wait(v_full.index(prior), ((step - 1) // STAGES) & 1)\n",
        "",
    ),
    Mistake(
        "no wait for the query tiles",
        "        mbarrier.wait(q_full, 0)\n",
        "",
    ),
    Mistake(
        "no wait for the product with a value tile",
        "acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc_token,))",
        "acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc_token,))",
        (Race,),
    ),
    Mistake(
        "no wait for the product with a key tile",
        "s = warpgroup_mma_wait(num_outstanding=1, deps=(s_token,))",
        "s = warpgroup_mma_wait(num_outstanding=2, deps=(s_token,))",
        (Race,),
    ),
    # a wrong count of arrivals
    Mistake(
        "one consumer alone empties a key stage",
        "mbarrier.init(k_empty.index(stage), count=2)",
        "mbarrier.init(k_empty.index(stage), count=1)",
    ),
    Mistake(
        "a value stage waits for three consumers",
        "mbarrier.init(v_empty.index(stage), count=2)",
        "mbarrier.init(v_empty.index(stage), count=3)",
        (Deadlock,),
    ),
    Mistake(
        "a key tile needs a second arrival",
        "mbarrier.init(k_full.index(stage), count=1)",
        "mbarrier.init(k_full.index(stage), count=2)",
        (Deadlock,),
    ),
    Mistake(
        "a barrier is not initialised",
        "    mbarrier.init(q_full, count=1)\n",
        "",
        (BarrierError,),
    ),
    # the arithmetic beside the protocol
    Mistake(
        "a cut value tile keeps its padding",
        "mask=(keys < kv_stop)[:, None], other=0.0",
        "mask=(keys < kv_stop + 1)[:, None], other=0.0",
        (WRONG_RESULT,),
    ),
    Mistake(
        "output rows past the end are stored",
        "mask=(rows < Sq)[:, None]",
        "mask=(rows < Sq + 1)[:, None]",
        (OutOfBounds,),
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_caught(mistake):
    source = mistake.plant()

    def run_until_caught() -> None:
        for seed in range(MISTAKE_SEEDS):
            check_mistake_problem(source, seed)

    with pytest.raises(mistake.caught_as):
        run_until_caught()


# The reasons are in the docstring of gluon_executor.py.
NOT_CAUGHT = [
    Mistake(
        "the producer's threads do not wait for each other's stores",
        "    fence_async_shared()\n    _barrier()\n",
        "    fence_async_shared()\n",
    ),
    # harmless: the next copy to it comes after one that waits for a value stage, released after both products
    Mistake(
        "a later key stage is released while the product reads it",
        "            s = warpgroup_mma_wait(num_outstanding=1, deps=(s_token,))\n"
        "            mbarrier.arrive(k_empty.index(stage), count=1)\n",
        "            mbarrier.arrive(k_empty.index(stage), count=1)\n"
        "            s = warpgroup_mma_wait(num_outstanding=1, deps=(s_token,))\n",
    ),
]


@pytest.mark.parametrize("mistake", NOT_CAUGHT, ids=lambda mistake: mistake.name)
def test_mistake_that_cannot_be_caught(mistake):
    source = mistake.plant()
    for seed in range(4):
        check_mistake_problem(source, seed)


def test_deadlock_report_names_partitions_barriers_and_places():
    unreleased = Mistake("", "            mbarrier.arrive(v_empty.index(prior), count=1)\n", "").plant()
    with pytest.raises(Deadlock) as caught:
        check_mistake_problem(unreleased, 0)
    line = 1 + unreleased.splitlines().index("            mbarrier.wait(v_empty.index(stage), phase)")
    assert (
        "partition 0 (_produce) waits for parity 0 of barrier 0 (in phase 0, 2 of 2 arrivals and 0 bytes missing) "
        f"at line {line} `mbarrier.wait(v_empty.index(stage), phase)`" in str(caught.value)
    )
    assert "partition 2 (_consume) waits for" in str(caught.value)


def test_seed_decides_what_happens():
    """The same seed gives the same end, and other seeds find other ends."""
    source = Mistake("", "            mbarrier.wait(k_empty.index(stage), phase)\n", "").plant()

    def ends() -> list[str]:
        found = []
        for seed in range(6):
            try:
                check_mistake_problem(source, seed)
                found.append("a right result")
            except ANYTHING as error:
                found.append(str(error))
        return found

    first = ends()
    assert ends() == first
    assert len(set(first)) > 1


SMALL_KERNEL = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

@gluon.jit
def kernel(pointer, first, step, COUNT: gl.constexpr):
    numbers = first + gl.arange(0, COUNT, None)
    total = gl.num_programs(0)
    alias = total
    total += 1
    gl.store(pointer + numbers * step, (numbers - 4) // 3 * 1000 + (numbers - 4) % 3 * 10 + alias)
"""


def test_small_kernel_divides_as_c_does_and_stays_in_its_tensor():
    kernel = load_kernels(SMALL_KERNEL, "small")["kernel"]
    memory = torch.zeros(24, dtype=torch.int32)
    view = memory[::3]
    launch(kernel, (1,), {"pointer": view, "first": 0, "step": 3, "COUNT": 8, "num_warps": 4}, seed=0)
    wanted = [int((i - 4) / 3) * 1000 + ((i - 4) - 3 * int((i - 4) / 3)) * 10 + 1 for i in range(8)]
    assert view.tolist() == wanted
    for outside in ({"first": 1, "step": 3}, {"first": -1, "step": 3}, {"first": 0, "step": 2}):
        with pytest.raises(OutOfBounds, match="outside the tensor's 8 elements"):
            launch(kernel, (1,), {"pointer": view, "COUNT": 8, **outside}, seed=0)


def test_loading_leaves_the_real_modules_alone():
    load_kernels(SMALL_KERNEL, "small")
    known = {name: module for name, module in sys.modules.items() if name.startswith("triton")}
    assert {name: module for name, module in known.items() if not isinstance(module, ModuleType)} == {}
    with pytest.raises(ImportError, match="the executor knows"):
        load_kernels("import triton.experimental.gluon.language", "small")
