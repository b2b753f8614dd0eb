"""Foreign JSON is checked once, at the door: what does not fit is named with its place, its rule and its value."""

from __future__ import annotations

import json
from typing import Annotated, Any, Required, TypedDict

import pytest

from xattn_video_pipelines.common.schema import Range, Seconds, Share, complaint, parse_json


class Inner(TypedDict):
    name: str
    shares: list[Share | None]


class Outer(TypedDict, total=False):
    id: Required[str]
    steps: Annotated[int, Range(1, 9)] | None
    seconds: Seconds
    inner: dict[str, Inner]
    either: int | str
    anything: Any
    flag: bool


GOOD = {
    "id": "a", "steps": 9, "seconds": 0, "inner": {"x": {"name": "n", "shares": [1, 0.5, None], "more": 3}},
    "either": "text", "anything": [{"deep": [1]}], "flag": False, "unknown": object,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"steps": None}, None),
        ({"id": 3}, "id must be a text, got 3"),
        ({"steps": True}, "steps must be a whole number from 1 to 9, or null, got true"),
        ({"steps": 3.0}, "steps must be a whole number from 1 to 9, or null, got 3.0"),
        ({"steps": 10**400}, "steps must be a whole number from 1 to 9, or null, got a very large number"),
        ({"seconds": "x"}, 'seconds must be a number from 0 to 1e+12, 0 or at least 1e-09, got "x"'),
        ({"seconds": 1e-300}, "seconds must be a number from 0 to 1e+12, 0 or at least 1e-09, got 1e-300"),
        ({"seconds": float("inf")}, "seconds must be a number from 0 to 1e+12, 0 or at least 1e-09, got Infinity"),
        ({"seconds": float("nan")}, "seconds must be a number from 0 to 1e+12, 0 or at least 1e-09, got NaN"),
        ({"inner": {"x": {"name": "n"}}}, "inner.x.shares is missing"),
        (
            {"inner": {"x": {"name": "n", "shares": [1, 2]}}},
            "inner.x.shares[1] must be a number from 0 to 1, or null, got 2",
        ),
        (
            {"inner": {"x": {"name": "n", "shares": [0.5, float("nan")]}}},
            "inner.x.shares[1] must be a number from 0 to 1, or null, got NaN",
        ),
        (
            {"inner": {"x": {"name": "n", "shares": [0.5] * 99 + [True]}}},
            "inner.x.shares[99] must be a number from 0 to 1, or null, got true",
        ),
        ({"inner": {"x": {"name": "n", "shares": [0.1] * 99 + [1]}}}, None),
        ({"inner": []}, "inner must be an object, got []"),
        ({"either": None}, "either must be a whole number or a text, got null"),
        ({"flag": 0}, "flag must be true or false, got 0"),
    ],
)
def test_what_does_not_fit_is_named(change, expected):
    assert complaint({**GOOD, **change}, Outer) == expected


def test_what_is_no_object_or_lacks_a_key():
    assert complaint([], Outer) == "it must be an object, got []"
    assert complaint({}, Outer) == "id is missing"
    assert complaint({"id": "x" * 100}, dict[str, int]) == f'id must be {rule_of_int()}, got "{"x" * 56}...'


def rule_of_int() -> str:
    return "a whole number from -1e+15 to 1e+15"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, NaN]", "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": 1, "b": 2, "a": 3}', 'the key "a" is there twice'),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        ("[" * 51 + "]" * 51, "nested too deep"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 0xff)"),
        ("9" * 5000, "a number is too long"),
        ("{", "Expecting property name enclosed in double quotes, column 2"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM (decode using utf-8-sig), column 1"),
        (b"\x00", "Expecting value, column 1"),
        ("", "Expecting value, column 1"),
    ],
)
def test_what_is_no_json_is_refused_with_its_reason(text, reason):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared)
        parse_json(text)
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    "value",
    [{}, [], "é\u2028", 10**300, 1e308, [[[]]] * 100, {"a": [{"b": [None, True]}] * 60}, [[i] for i in range(1000)]],
)
def test_all_other_json_comes_back_as_it_is(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_fifty_levels_are_read():
    assert json.dumps(parse_json("[" * 50 + "]" * 50)) == "[" * 50 + "]" * 50
