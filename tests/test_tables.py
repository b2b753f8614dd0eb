"""The one table of all programs."""

from __future__ import annotations

from xattn_video_pipelines.common.tables import aligned


def test_columns_are_as_wide_as_their_cells_with_rules_where_asked():
    lines = [("video", "PSNR dB", ""), ("a-s0", "31.5", "x"), ("mean of all", "-", "")]
    assert aligned(lines, left=1, rules=(1, 2, 3)).splitlines() == [
        "video        PSNR dB",
        "-----------------------",
        "a-s0            31.5  x",
        "-----------------------",
        "mean of all        -",
        "-----------------------",
    ]
    assert aligned(lines).splitlines()[1] == "       a-s0     31.5  x"


def test_wide_characters_keep_the_columns_and_brackets_are_text():
    text = aligned([("prompt", "n"), ("日本", "1"), ("[red]é[/]", "22")], left=1).splitlines()
    assert text == ["prompt      n", "日本        1", "[red]é[/]  22"]
