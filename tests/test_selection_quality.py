"""Does the score find the blocks that matter: the measures themselves, the scorers, and the program on small inputs."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xattn_video.testing.synthetic import causal_text_like_qkv, video_like_qkv
from xattn_video_eval.bench import demo_tensors
from xattn_video_eval.report.paper_tables import broken_order, compare_orders, load_paper_tables
from xattn_video_eval.studies import block_scorers, selection_quality
from xattn_video_eval.studies.block_scorers import EXACT, SCORERS, exact_block_mass, tile_permutation
from xattn_video_eval.studies.ranking import recalled_mass, roc_auc, spearman
from xattn_video_eval.studies.selection_measures import (
    Problem,
    as_good_for_less,
    measure_rules,
    measure_scorers,
    measure_thresholds,
)

GUESSES = [name for name in SCORERS if name != EXACT]
BLOCK = 16


def made(causal: bool, tokens: int = 500, heads: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    if causal:
        query, key, _ = causal_text_like_qkv(1, heads, tokens, 32, seed=seed)
    else:
        query, key, _ = video_like_qkv(1, heads, tokens // 64, 8, 8, 32, text_tokens=tokens % 64, seed=seed)
    return query, key


def problem(causal: bool, **changes: Any) -> Problem:
    return Problem.of(*made(causal, **changes), block_size=BLOCK, causal=causal)


def scored(name: str, query: Tensor, key: Tensor, stride: int, **changes: Any) -> Tensor:
    settings: dict[str, Any] = {"stride": stride, "block_size": BLOCK, "causal": False, "seed": 0}
    return SCORERS[name].score(query, key, **{**settings, **changes})


# --- ranking ---------------------------------------------------------------------------------------------------


def tied_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Scores and truths with many ties, and which entries count: rows of 7 to 16 valid entries out of 16."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (3, 10, 16), generator=generator).float() / 5
    truth = torch.randint(4, (3, 10, 16), generator=generator).float() / 4 + scores.round()
    valid = (torch.arange(16) < torch.arange(7, 17)[:, None]).expand(scores.shape)
    # Invalid entries are neither largest nor smallest, so that counting them would show.
    return torch.where(valid, scores, 0.4), torch.where(valid, truth, 0.5), valid


def test_spearman_is_scipys_on_ties() -> None:
    scores, truth, valid = tied_rows()
    ours = spearman(scores, truth, valid)
    rows = list(zip(scores.view(-1, 16), truth.view(-1, 16), valid.reshape(-1, 16), ours.view(-1), strict=True))
    for score, true, counts, value in rows:
        expected = stats.spearmanr(score[counts].numpy(), true[counts].numpy()).statistic
        assert value.item() == pytest.approx(expected, abs=1e-12)
    assert len({round(value.item(), 6) for *_, value in rows}) > 20


def test_auc_is_scipys_on_ties() -> None:
    scores, truth, valid = tied_rows()
    positive = truth > 0.9
    ours = roc_auc(scores, positive, valid).view(-1)
    defined = 0
    flat = (tensor.reshape(-1, 16) for tensor in (scores, positive, valid))
    for score, true, counts, value in zip(*flat, ours, strict=True):
        above, below = score[counts & true], score[counts & ~true]
        if not above.numel() or not below.numel():
            assert value.isnan()
            continue
        defined += 1
        expected = stats.mannwhitneyu(above.numpy(), below.numpy()).statistic / (above.numel() * below.numel())
        assert value.item() == pytest.approx(expected, abs=1e-12)
    assert defined > 20


def test_scores_that_say_nothing_are_worth_nothing() -> None:
    truth, valid = torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]])
    level = torch.full_like(truth, 0.5)
    assert spearman(level, truth, valid).item() == 0
    assert roc_auc(level, truth > 2, valid).item() == 0.5
    # no order to find: not a failure of the scores
    assert spearman(truth, level, valid).isnan().all()
    assert spearman(truth, truth, torch.tensor([[True, False, False, False]])).isnan().all()


def test_recalled_mass_counts_valid_blocks_only() -> None:
    mass = torch.tensor([[0.5, 0.25, 0.25, 7.0]])
    kept = torch.tensor([[True, False, True, True]])
    assert recalled_mass(mass, kept, torch.tensor([[True, True, True, False]])).item() == 0.75


# --- exact mass and scorers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_exact_mass_is_the_mean_of_dense_rows(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 75, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 75, 8, generator=generator, dtype=torch.float64)
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(8)
    if causal:
        logits = logits.masked_fill(torch.ones(75, 75).triu(1).bool(), -math.inf)
    prob = torch.softmax(logits, -1)
    expected = torch.stack([part.sum(-1) for part in prob.split(BLOCK, 3)], -1)
    expected = torch.stack([part.mean(2) for part in expected.split(BLOCK, 2)], 2)
    whole = exact_block_mass(query, key, block_size=BLOCK, causal=causal)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole, expected)
    # in chunks of two blocks of rows, of which the last has one
    monkeypatch.setattr(block_scorers, "CHUNK_ELEMENTS", 2 * BLOCK * 75)
    torch.testing.assert_close(exact_block_mass(query, key, block_size=BLOCK, causal=causal), expected)


def tile_logit(name: str, queries: Tensor, keys: Tensor, stride: int, seed: int) -> Tensor:
    """The logit of one tile from the queries and keys `[n, D]` that it has, written down once more."""
    if name.endswith("pooling"):
        pool = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[name.removesuffix("_pooling")]
        return pool(queries, 0) @ pool(keys, 0)
    pattern = {
        "antidiagonal": lambda i: stride - 1 - i,
        "diagonal": lambda i: i,
        "random_in_tile": tile_permutation(stride, seed).tolist().__getitem__,
    }[name]
    products = [queries[pattern(i)] @ keys[i] for i in range(len(keys)) if pattern(i) < len(queries)]
    return torch.stack(products).sum() / stride if products else torch.zeros((), dtype=queries.dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", GUESSES)
def test_scores_are_their_definition_tile_by_tile(name: str, causal: bool) -> None:
    length, stride, seed = 41, 4, 5
    generator = torch.Generator().manual_seed(1)
    query, key = (2 * torch.randn(1, 2, length, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    groups = math.ceil(length / stride)
    for head in range(2):
        query_groups, key_groups = query[0, head].split(stride), key[0, head].split(stride)
        for row in range(groups):
            seen = row + 1 if causal else groups
            logits = [tile_logit(name, query_groups[row], key_groups[column], stride, seed) for column in range(seen)]
            for column, prob in enumerate(torch.softmax(torch.stack(logits) / math.sqrt(8), 0)):
                expected[0, head, row * stride // BLOCK, column * stride // BLOCK] += prob
    backend = "reference"
    scores = scored(name, query, key, stride, causal=causal, seed=seed, backend=backend)
    torch.testing.assert_close(scores, expected)


def test_the_random_pattern_has_one_element_a_row_and_column_and_follows_the_seed() -> None:
    patterns = [tile_permutation(16, seed).tolist() for seed in range(20)]
    assert all(sorted(pattern) == list(range(16)) for pattern in patterns)
    assert len({tuple(pattern) for pattern in patterns}) == 20
    query, key = made(False)
    one, same, other = (scored("random_in_tile", query, key, 16, seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    assert not torch.allclose(one, other, rtol=0.1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", GUESSES)
def test_with_stride_one_every_score_is_the_exact_mass(name: str, causal: bool) -> None:
    query, key = made(causal, tokens=150)
    rows = torch.tensor([BLOCK] * 9 + [6.0])[:, None]
    exact = exact_block_mass(query, key, block_size=BLOCK, causal=causal)
    torch.testing.assert_close(scored(name, query, key, 1, causal=causal), exact * rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 4, 16])
@pytest.mark.parametrize("name", SCORERS)
def test_the_cost_is_the_multiply_adds_that_are_made(name: str, stride: int) -> None:
    query, key = made(False, tokens=256)
    counter = FlopCounterMode(display=False)
    # the other backends' operations are opaque to the counter
    with counter:
        scored(name, query, key, stride, backend="reference")
    whole = 2 * query[..., 0].numel() * key.shape[2] * query.shape[3]
    assert counter.get_total_flops() / whole == SCORERS[name].cost(stride)


def test_unequal_lengths_and_strides_that_do_not_fit_are_errors() -> None:
    query, key = made(False, tokens=128)
    for name in ("diagonal", "random_in_tile", "mean_pooling"):
        with pytest.raises(ValueError, match="query and key must have one length, got 128 and 127"):
            scored(name, query, key[:, :, 1:], 4)
        with pytest.raises(ValueError, match="stride must divide block_size, got stride 32"):
            scored(name, query, key, 32)


# --- measures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_beats_the_oracle(causal: bool) -> None:
    rows = measure_scorers(problem(causal), (2, 4, 8, 16), 0.9, seed=0)
    (oracle,) = (row for row in rows if row["scorer"] == EXACT)
    assert oracle["spearman"] == pytest.approx(1)
    assert oracle["auc"] == 1
    assert oracle["recall"] >= 0.9
    others = [row for row in rows if row["scorer"] != EXACT]
    assert len(others) == 4 * len(GUESSES)
    for row in others:
        assert row["recall"] <= oracle["recall"]
        assert row["auc"] < 1
        assert row["spearman"] < 1
        for head, recall in enumerate(row["by_head"]["recall"]):
            assert recall <= oracle["by_head"]["recall"][head]
    assert min(row["recall"] for row in others) < oracle["recall"] - 0.1
    # one head alone gives its own column
    alone = measure_scorers(problem(causal, heads=1), (4,), 0.9, seed=0)
    assert all(row["by_head"]["auc"] == [row["auc"]] for row in alone)


def lines_at(distance: int) -> Problem:
    """Every query block has one key block that matters, in which each second slash line is strong.

    Strong are the pairs whose distance has the parity of `distance`; the others are as weak as those are strong.
    """
    blocks = 8
    signs = torch.tensor([1.0, -1.0]).repeat(BLOCK // 2)
    # Block I looks for block (3 I + 1) mod 8, each of them in a dimension of its own; distances inside it alternate.
    partner = torch.eye(blocks)[(3 * torch.arange(blocks) + 1) % blocks]
    strength = math.sqrt(4.0 * math.sqrt(blocks))
    query = (partner[:, None] * signs[None, :, None]).flatten(0, 1) * strength
    key = (torch.eye(blocks)[:, None] * signs[None, :, None]).flatten(0, 1) * strength * (-1) ** distance
    return Problem.of(query[None, None], key[None, None], block_size=BLOCK, causal=False)


def test_slash_lines_that_mean_pooling_averages_away_are_found_by_the_antidiagonal() -> None:
    odd = lines_at(1)
    partners = (3 * torch.arange(8) + 1) % 8
    assert torch.equal(odd.mass[0, 0].argmax(-1), partners)
    by_name = {row["scorer"]: row for row in measure_scorers(odd, (4,), 0.5, seed=0)}
    assert by_name["antidiagonal"]["auc"] == 1
    assert by_name["antidiagonal"]["recall"] == by_name[EXACT]["recall"]
    # no better than chance, and than any block
    assert by_name["mean_pooling"]["auc"] == 0.5
    assert by_name["mean_pooling"]["recall"] < by_name[EXACT]["recall"] / 2
    assert by_name["diagonal"]["auc"] < 0.5


def test_the_antidiagonal_misses_slash_lines_that_it_never_crosses() -> None:
    # Its elements all lie at odd distances from the tile's own diagonal.
    by_name = {row["scorer"]: row for row in measure_scorers(lines_at(0), (4,), 0.5, seed=0)}
    assert by_name["antidiagonal"]["auc"] < 0.5
    assert by_name["diagonal"]["auc"] == 1


def test_rules_are_compared_at_one_density() -> None:
    case = problem(False)
    rows = measure_rules(case, 4, (0.5, 0.8, 1.0))
    scores = case.antidiagonal(4)
    ranked = case.mass.gather(-1, scores.sort(dim=-1, descending=True, stable=True).indices).cumsum(-1).mean((0, 1, 2))
    blocks = scores.shape[-1]
    for row, threshold in zip(rows, (0.5, 0.8, 1.0), strict=True):
        kept = case.keeps(scores, threshold=threshold)
        assert row["density"] == kept.double().mean().item()
        assert row["recall"]["threshold"] == pytest.approx((case.mass * kept).sum(-1).mean().item(), rel=1e-5)
        # no block is forced and rows are equally long: k blocks a row for the mean k of the threshold, by hand
        mean = row["density"] * blocks
        whole = min(int(mean), blocks - 1)
        expected = torch.lerp(ranked[whole - 1], ranked[whole], mean - whole).item()
        assert row["top_k"] == pytest.approx(mean)
        assert row["recall"]["top_k"] == pytest.approx(expected, rel=1e-5)
        assert row["recall"]["top_ratio"] == pytest.approx(expected, rel=1e-5)
    assert rows[-1]["recall"] == pytest.approx({"threshold": 1, "top_k": 1, "top_ratio": 1})


def test_causal_rows_of_unequal_length_tell_the_rules_apart() -> None:
    case = problem(True)
    for row in measure_rules(case, 4, (0.7, 0.9)):
        assert row["recall"]["top_k"] != pytest.approx(row["recall"]["top_ratio"], abs=0.01)
        # what is forced is in every density
        assert row["density"] > 2 * case.mass.shape[2] / case.valid[0, 0].sum() * 0.9
        assert 1 <= row["top_k"] <= case.mass.shape[2]


def test_thresholds_beside_what_the_oracle_needs() -> None:
    case = problem(False)
    rows = measure_thresholds(case, 8, (0.3, 0.6, 0.9, 1.0))
    for row in rows[:-1]:
        ordered = case.mass.double().sort(dim=-1, descending=True).values
        needed = (ordered.cumsum(-1) - ordered < row["threshold"]).float().mean().item()
        assert row["oracle_density"] == pytest.approx(needed)
    densities = [row["density"] for row in rows]
    recalls = [row["recall"] for row in rows]
    assert densities == sorted(densities)
    assert recalls == sorted(recalls)
    assert (rows[-1]["density"], rows[-1]["recall"], rows[-1]["oracle_density"]) == (1, 1, 1)
    # a score that is wrong about the mass recalls another share than was asked for
    assert rows[0]["recall"] != pytest.approx(0.3, abs=0.01)


def test_what_is_as_good_for_less_is_the_cheapest_of_each_scorer() -> None:
    def row(scorer: str, stride: int, cost: float, recall: float) -> dict[str, Any]:
        return {"scorer": scorer, "stride": stride, "cost": cost, "recall": recall, "auc": 1.0}

    rows = [
        row("antidiagonal", 4, 1 / 4, 0.97),
        row("antidiagonal", 8, 1 / 8, 0.95),
        row("antidiagonal", 16, 1 / 16, 0.94),
        row("diagonal", 8, 1 / 8, 0.9495),
        row("mean_pooling", 2, 1 / 4, 0.99),
        row("mean_pooling", 4, 1 / 16, 0.96),
        row("mean_pooling", 8, 1 / 64, 0.951),
        row("max_pooling", 8, 1 / 64, 0.9),
    ]
    found = as_good_for_less(rows, 8)
    assert [(entry["scorer"], entry["stride"]) for entry in found] == [("mean_pooling", 8), ("diagonal", 8)]
    assert found[0] == {"scorer": "mean_pooling", "stride": 8, "cost": 1 / 64, "recall": 0.951}


# --- the paper's tables ----------------------------------------------------------------------------------------


def test_the_papers_numbers_are_the_seeds() -> None:
    seeds = Path(__file__).resolve().parents[2] / "shared" / "data" / "seed_tables.json"
    if not seeds.is_file():
        pytest.skip("the tables that ours are copied from are not part of the project")
    published = json.loads(seeds.read_text(encoding="utf-8"))
    tables = load_paper_tables()["tables"]
    rules = tables.pop("selection_rules")
    assert rules["values"]["settings"] == published["settings"]["top_k"]
    assert set(tables) == {
        "block_importance_4k",
        "stride_ruler_llama31_8b",
        "threshold_llama31_8b_stride4",
        "density_percent_at_threshold_0.9",
        "video_generation_wan21_14b",
    }
    for name, table in tables.items():
        assert table["values"] == published[name]


def test_every_table_of_theirs_says_where_it_comes_from() -> None:
    paper = load_paper_tables()
    assert "2503.16428" in paper["paper"]
    assert paper["label"].startswith("theirs: other models")
    for table in paper["tables"].values():
        assert table["source"]
        assert table["measure"]
        assert table["paper_table"] in (None, 8)


def test_an_order_breaks_where_neighbours_are_the_other_way_round() -> None:
    theirs = {"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0, "e": 0.5}
    assert broken_order(theirs, {"a": 9, "b": 5, "c": 4, "d": 3, "e": None}) == []
    assert broken_order(theirs, {"a": 9, "b": 4, "c": 5, "d": 4, "x": 1}) == ["b (4.0000) is not above d (4.0000)"]
    # that a is not above d either goes without saying
    assert broken_order(theirs, {"a": 1, "b": 5, "d": 4}) == ["a (1.0000) is not above b (5.0000)"]
    assert broken_order(theirs, {"a": 1, "d": 2}) == ["a (1.0000) is not above d (2.0000)"]


def test_orders_that_hold_and_orders_that_do_not() -> None:
    published = load_paper_tables()["tables"]
    importance = published["block_importance_4k"]["values"]
    scorers = [
        {"scorer": name, "stride": stride, "recall": 0.9 - stride / 1000, **values}
        for stride in (1, 8, 64)
        for name, values in importance.items()
    ]
    scorers[5] |= {"auc": 0.9}
    scorers.append({"scorer": EXACT, "stride": None, "recall": 1.0, "spearman": 1.0, "auc": 1.0})
    rules = [
        {"threshold": 0.5, "density": 0.2, "recall": {"threshold": 0.6, "top_k": 0.7, "top_ratio": 0.8}},
        {"threshold": 0.9, "density": 0.4, "recall": {"threshold": 0.8, "top_k": 0.7, "top_ratio": 0.9}},
    ]
    thresholds = [
        {"threshold": 0.8, "density": 0.3, "recall": 0.8},
        {"threshold": 0.9, "density": 0.2, "recall": 0.9},
        {"threshold": 0.99, "density": 0.1, "recall": 0.1},
    ]
    orders = compare_orders(scorers, rules, thresholds)
    broken = {entry["ours"]: entry["broken"] for entry in orders}
    assert broken == {
        "spearman at stride 8": [],
        "auc at stride 8": ["antidiagonal (0.8400) is not above diagonal (0.9000)"],
        "spearman at stride 64": [],
        "auc at stride 64": [],
        # theirs is best at 8
        "mass recalled, their accuracy, by stride": ["8 (0.8920) is not above 1 (0.8990)"],
        "mass recalled at density 0.200 (threshold 0.5)": ["threshold (0.6000) is not above top_k (0.7000)"],
        "mass recalled at density 0.400 (threshold 0.9)": [],
        "density by threshold": ["0.9 (0.2000) is not above 0.8 (0.3000)"],
        "mass recalled, their accuracy, by threshold": [],
    }
    assert all(entry["holds"] == (not entry["broken"]) for entry in orders)
    # Densities by length, and the likeness of their videos, have no counterpart in what is measured here.
    others = {"density_percent_at_threshold_0.9", "video_generation_wan21_14b"}
    assert {entry["table"] for entry in orders} == set(published) - others


# --- the program -----------------------------------------------------------------------------------------------

SMALL = ["--tokens", "300", "--block-size", "16", "--samples", "1", "--heads", "2", "--stride", "4"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the demo file that may be there, nor writes to the ledger."""
    monkeypatch.setattr(selection_quality, "LEDGER", tmp_path / "results" / "ledger.jsonl")
    for module in (demo_tensors, selection_quality):
        monkeypatch.setattr(module, "DEMO_QKV", tmp_path / "demo_qkv.safetensors")


def save_demo(path: Path) -> None:
    query, key, value = video_like_qkv(1, 2, 3, 8, 8, 16)
    tensors = {
        f"layer{head}.head0.step09.{part}": tensor[:, head : head + 1].bfloat16().contiguous()
        for head in range(2)
        for part, tensor in (("query", query), ("key", key), ("value", value))
    }
    save_file(tensors, path, {"grid": "3x8x8"})


def test_the_program_prints_tables_or_json_and_never_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert selection_quality.main([*SMALL, "--threshold", "0.85", "--json"]) == 0
    assert not selection_quality.LEDGER.exists()
    printed = capsys.readouterr()
    lines, report = printed.err.splitlines(), json.loads(printed.out)
    assert list(report["skipped"]) == ["demo"]
    assert any(line.startswith("skipped demo: no file demo_qkv.safetensors") for line in lines)
    video, text = report["rows"]
    assert (video["inputs"], text["inputs"]) == ("video", "text")
    assert (video["causal"], text["causal"]) == (False, True)
    assert (video["grid"], text["grid"]) == ([1, 16, 16], None)
    assert (video["head_names"], text["head_names"]) == (["local", "temporal"], ["slash", "vertical"])
    for row in report["rows"]:
        assert (row["tokens"], row["samples"], row["heads"], row["threshold"], row["stride"]) == (300, 1, 2, 0.85, 4)
        assert row["versions"]["torch"] == torch.__version__
        assert row["device"]
        # strides above the block size are left out; the oracle has none
        pairs = [(entry["scorer"], entry["stride"]) for entry in row["scorers"]]
        assert pairs == [(name, 2**power) for name in GUESSES for power in range(5)] + [(EXACT, None)]
        for entry in row["scorers"]:
            assert 0 < entry["recall"] <= 1
            assert entry["cost"] == SCORERS[entry["scorer"]].cost(entry["stride"] or 1)
            assert len(entry["by_head"]["recall"]) == 2
        assert [entry["threshold"] for entry in row["rules"]] == [0.5, 0.7, 0.8, 0.85, 0.9, 0.95]
        assert 0.85 in [entry["threshold"] for entry in row["thresholds"]]
        assert any(order["holds"] for order in row["orders"])
        assert any(not order["holds"] for order in row["orders"])
        for order in row["orders"]:
            assert any(order["ours"] in line and all(text in line for text in order["broken"]) for line in lines)
    # theirs beside ours, told apart
    importance = next(line for line in lines if line.split()[:2] == ["antidiagonal", "0.2500"])
    assert importance.split()[3] == "0.49"
    assert sum("theirs: other models" in line for line in lines) == 2
    assert sum("definition" in line or SCORERS["diagonal"].definition in line for line in lines) == 1


def test_rows_are_appended_when_asked_for_and_repeat_with_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("0",), ("0",), ("1", "--json")):
        printed = capsys.readouterr().out
        assert selection_quality.main([*SMALL, "--inputs", "text", "--record", "--seed", *words]) == 0
    assert "== text: " in printed
    assert "{" not in printed
    rows = [json.loads(line) for line in selection_quality.LEDGER.read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 0, 1]
    assert rows[0] == json.loads(json.dumps(rows[1] | {"time": rows[0]["time"]}))
    assert rows[0]["scorers"] != rows[2]["scorers"]
    assert json.loads(capsys.readouterr().out)["rows"] == rows[2:]


def test_the_demo_models_tensors_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    save_demo(demo_tensors.DEMO_QKV)
    assert selection_quality.main([*SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["skipped"] == {}
    assert [row["inputs"] for row in report["rows"]] == ["demo", "video", "text"]
    demo = report["rows"][0]
    assert (demo["tokens"], demo["heads"], demo["head_dim"], demo["grid"]) == (192, 2, 16, [3, 8, 8])
    assert demo["head_names"] == ["layer0.head0.step09", "layer1.head0.step09"]
    # one head after the other, as in the file
    entries = demo_tensors.load_demo_qkv()
    for head, entry in enumerate(entries):
        alone = Problem.of(entry.query.float(), entry.key.float(), block_size=16, causal=False)
        wanted = measure_scorers(alone, (4,), 0.9, seed=0)[0]
        assert (demo["scorers"][2]["scorer"], demo["scorers"][2]["stride"]) == ("antidiagonal", 4)
        assert demo["scorers"][2]["by_head"]["auc"][head] == pytest.approx(wanted["auc"])


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    path = tmp_path / "new" / "selection.png"
    assert selection_quality.main([*SMALL, "--plot", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert f"wrote {path}" in capsys.readouterr().out


def test_without_matplotlib_the_plot_is_an_error_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert selection_quality.main([*SMALL, "--plot", str(tmp_path / "selection.png")]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err
        == "selection_quality: error: --plot needs matplotlib; install it with: pip install 'xattn-video[plot]'\n"
    )
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inputs", "demo"], "--inputs demo: "),
        (
            ["--inputs", "text", "demo"],
            "no such file; make one with: python -m xattn_video_pipelines.demo.training.capture",
        ),
        (["--inputs", "film"], "invalid choice: 'film'"),
        (["--tokens", "31", "--block-size", "16"], "--tokens must be 32, two blocks, or more, got 31"),
        (["--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (["--heads", "0"], "--heads must be 1 or more, got 0"),
        (["--samples", "0"], "--samples must be 1 or more, got 0"),
        (["--stride", "3"], "--stride must be a power of two, got 3"),
        (["--stride", "16", "--block-size", "8"], "--stride must divide block-size, got stride 16 and block-size 8"),
        (["--block-size", "100"], "--block-size must be a power of two, got 100"),
        (["--block-size", "1", "--stride", "1"], "--block-size must be 2 or more, got 1"),
        (["--threshold", "1"], "--threshold must be above 0 and below 1, got 1.0"),
        (["--threshold", "nan"], "--threshold must be above 0 and below 1, got nan"),
        (["--locality", "1.5"], "--locality must be from 0 to 1, got 1.5"),
        (["--seed", "-1"], "--seed must be from 0 to 2**63 - 1, got -1"),
        (["--plot", "picture.pdf"], "--plot must end in .png, got picture.pdf"),
        (["--plot", "folder.png"], "--plot: folder.png is a folder"),
        (["--plot", "file/picture.png"], "file: cannot write here: File exists"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an extra, and its lack is reported first")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    assert failure(arguments, capsys).startswith("selection_quality: error: ")
    assert message in failure(arguments, capsys)


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the program wrote to stderr, after exit code 2 and nothing on stdout."""
    try:
        code = selection_quality.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_sizes_do_not_go_with_the_demos_own_and_a_bad_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    save_demo(demo_tensors.DEMO_QKV)
    line = failure(["--inputs", "demo", "--tokens", "4096"], capsys)
    assert line.startswith("selection_quality: error: --tokens does not go with --inputs demo")
    demo_tensors.DEMO_QKV.write_bytes(b"not tensors at all")
    line = failure(["--inputs", "text", "demo", *SMALL], capsys)
    assert "demo_qkv.safetensors: not a safetensors file" in line


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert selection_quality.main(["--help"]) == 0
    assert "example:\n  python -m xattn_video_eval.studies.selection_quality\n" in capsys.readouterr().out
