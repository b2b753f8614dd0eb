"""What a Python prompt and a notebook show of the statistics."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
import torch

from xattn_video.stats import REASONS, AttentionStats


@pytest.fixture
def stats() -> AttentionStats:
    """Two layers over three steps: step 0 is dense, then half and a quarter of the blocks are kept."""
    stats = AttentionStats()
    counts = stats.add_model(["transformer.a<b>", "transformer.c"])
    for step, kept in enumerate((None, 2, 1)):
        counts.begin_forward(step, torch.device("cpu"))
        for layer in counts.layers:
            if kept is None:
                layer.add_dense("warmup")
            else:
                layer.add_sparse(torch.tensor(kept), torch.tensor(4))
    return stats


def test_a_prompt_shows_the_main_numbers(stats: AttentionStats) -> None:
    for seconds in (2.0, 40.0, 2.5):
        stats.times.add("dense", seconds)
    stats.times.add("sparse", 1.25)
    assert dict(re.split(r"  +", line) for line in repr(stats).splitlines()[2:]) == {
        "calls": "6",
        "sparse calls": "4",
        "dense calls: warmup": "2",
        "density, all calls": "58.3%",
        "density, sparse calls": "37.5%",
        "seconds per forward": "dense 2.5, sparse 1.25",
    }
    assert stats.summary()["density"] == pytest.approx(7 / 12)


def test_it_stays_short_whatever_the_reasons() -> None:
    stats = AttentionStats()
    assert "unknown" in repr(stats)
    counts = stats.add_model(["layer"])
    counts.begin_forward(0, torch.device("cpu"))
    for number, reason in enumerate(REASONS):
        for _ in range(number + 1):
            counts.layers[0].add_dense(reason)
    lines = repr(stats).splitlines()
    assert len(lines) <= 12
    assert sum(int(line.split()[-1]) for line in lines if line.startswith("dense calls: ")) == sum(
        range(1, len(REASONS) + 1)
    )


def test_the_table_has_each_layer_and_step(stats: AttentionStats) -> None:
    table = stats.table()
    assert table.header == ("layer", "step 0", "step 1", "step 2")
    assert table.rows[0] == ("transformer.a<b>", "100.0%", "50.0%", "25.0%")
    assert [row[0] for row in table.rows[1:]] == ["transformer.c", "all layers"]
    assert len(repr(table).splitlines()) == 5
    assert AttentionStats().table().rows == []


def test_a_notebook_shows_the_names_of_layers_as_text(stats: AttentionStats) -> None:
    html = stats.table()._repr_html_()
    # it is well formed only if what layers are called is escaped
    cells = [cell.text for cell in ET.fromstring(html).iter("td")]
    assert cells[:2] == ["transformer.a<b>", "100.0%"]
    shown = [cell.text for cell in ET.fromstring(stats._repr_html_()).iter("td")]
    assert shown[:2] == ["calls", "6"]


def test_starting_over_forgets_the_times(stats: AttentionStats) -> None:
    stats.times.add("sparse", 1.0)
    stats.reset()
    assert "seconds" not in repr(stats)
