"""What a JSON file from elsewhere must hold, checked once where it is read: the code behind can rely on it.

A schema is a `TypedDict`; keys that it does not name may hold anything. Its annotations are `str`, `bool`, `int`,
`float`, `None`, `Any`, `list[...]`, `dict[str, ...]`, another `TypedDict`, unions of these, and `Annotated[...]` with a
`Range` or with a function that says what is wrong with a value.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, NotRequired, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

# Sums, means and ratios of so many numbers of this size stay finite.
_LARGEST = 1e15
_DEEPEST = 50
_Check = Callable[[Any], None]


@dataclass(frozen=True)
class Range:
    """A number must lie from `low` to `high`, and be 0 or at least `least` away from it, so that it can divide."""

    low: float
    high: float
    least: float = 0.0

    def __str__(self) -> str:
        apart = f", 0 or at least {self.least:g}" if self.least else ""
        return f"from {self.low:g} to {self.high:g}{apart}"


# Times in seconds, which others are divided by.
Seconds = Annotated[float, Range(0, 1e12, least=1e-9)]
Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(0, 2**53)]


class _Wrong(Exception):
    """A value is not what it must be; `where` grows on the way out, from the innermost key to the outermost."""

    def __init__(self, rule: str, value: Any) -> None:
        super().__init__(rule)
        self.where, self.rule, self.value = "", rule, value


def complaint(value: Any, schema: Any) -> str | None:
    """What is wrong with a value, such as `seconds must be a number from 0 to 1e+12, got "x"`; None where it fits."""
    try:
        _check_of(schema)(value)
    except _Wrong as wrong:
        where = wrong.where.lstrip(".") or "it"
        return f"{where} must be {wrong.rule}, got {_shown(wrong.value)}" if wrong.rule else f"{where} is missing"
    return None


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Stricter than `json.loads`: what RFC 8259 leaves open or forbids is refused.

    Raises:
        ValueError: not UTF-8, not JSON, NaN or Infinity, an integer of thousands of digits, a key twice, or nested
            more than 50 deep. The message is a reason without the file's name.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except _Refused:
        raise
    except ValueError:
        raise ValueError("a number is too long") from None
    # Most texts have fewer brackets than that, whatever they hold.
    if text.count("[") + text.count("{") > _DEEPEST and _deeper_than(value, _DEEPEST):
        raise ValueError("nested too deep")
    return value


class _Refused(ValueError):
    pass


def _refuse_constant(name: str) -> Any:
    raise _Refused(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise _Refused(f"the key {_shown(twice)} is there twice")
    return values


def _deeper_than(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [outer for outer in level if type(outer) in (dict, list)]
        if not level:
            return False
        level = [inner for outer in level for inner in (outer.values() if type(outer) is dict else outer)]
    return True


@functools.cache
def _check_of(kind: Any) -> _Check:
    """The function that raises `_Wrong` for a value that is not of this kind."""
    origin = get_origin(kind)
    if kind is Any:
        return lambda value: None
    if origin is Annotated:
        return _with_rules(*get_args(kind))
    if origin in (Union, UnionType):
        return _one_of(get_args(kind))
    if origin is list:
        return _list_of(*get_args(kind))
    if origin is dict:
        return _dict_of(get_args(kind)[1])
    if is_typeddict(kind):
        return _object_of(kind)
    return _numbers(Range(-_LARGEST, _LARGEST), kind) if kind in (int, float) else _plain(kind)


def _plain(kind: Any) -> _Check:
    kind = NoneType if kind is None else kind

    def check(value: Any) -> None:
        if type(value) is not kind:
            raise _Wrong(_words(kind), value)

    return check


def _numbers(span: Range, kind: Any) -> _Check:
    low, high, least = span.low, span.high, span.least
    # JSON writes 5.0 as 5 or as 5.0, so whole numbers are numbers too. bool is a subclass of int in Python.
    types = (int, float) if kind is float else (int,)
    rule = f"{_words(kind)} {span}"

    def check(value: Any) -> None:
        # Written so that a NaN fails too.
        if type(value) not in types or not low <= value <= high or (least and 0 < abs(value) < least):
            raise _Wrong(rule, value)

    return check


def _with_rules(kind: Any, *rules: Any) -> _Check:
    checks = [_numbers(rule, kind) for rule in rules if isinstance(rule, Range)] or [_check_of(kind)]
    others = [rule for rule in rules if not isinstance(rule, Range)]

    def check(value: Any) -> None:
        for inner in checks:
            inner(value)
        for rule in others:
            if (wanted := rule(value)) is not None:
                raise _Wrong(wanted, value)

    return check


def _one_of(kinds: tuple[Any, ...]) -> _Check:
    others = [kind for kind in kinds if kind is not NoneType]
    checks, nullable = [_check_of(kind) for kind in others], len(others) < len(kinds)

    def check(value: Any) -> None:
        if value is None and nullable:
            return
        first: _Wrong | None = None
        for inner in checks:
            try:
                inner(value)
                return
            except _Wrong as wrong:
                first = first or wrong
        assert first is not None
        if len(checks) > 1:
            raise _Wrong(" or ".join(map(_words, kinds)), value)
        if nullable and not first.where:
            raise _Wrong(f"{first.rule}, or null", value)
        raise first

    return check


def _list_of(kind: Any) -> _Check:
    inner, fast = _check_of(kind), _fast_check(kind)

    def check(value: Any) -> None:
        if type(value) is not list:
            raise _Wrong("a list", value)
        if fast(value):
            return
        place = 0
        try:
            for place, item in enumerate(value):  # noqa: B007  (the place is told where one does not fit)
                inner(item)
        except _Wrong as wrong:
            wrong.where = f"[{place}]{wrong.where}"
            raise

    return check


def _fast_check(kind: Any) -> Callable[[list[Any]], bool]:
    """Whether a list of numbers surely fits; one look at all of them takes a tenth of a look at each.

    A manifest has thousands of them in a line, and ten thousand lines.
    """
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    numbers = [option for option in options if option is not NoneType]
    base, *rules = get_args(numbers[0]) if get_origin(numbers[0]) is Annotated else (numbers[0],)
    span = rules[0] if rules else Range(-_LARGEST, _LARGEST)
    if len(numbers) > 1 or base not in (int, float) or not isinstance(span, Range) or span.least:
        return lambda values: not values
    types = {int, float} if base is float else {int}
    types |= {NoneType} if len(options) > 1 else set()

    def fits(values: list[Any]) -> bool:
        if not set(map(type, values)) <= types:
            return False
        known = [value for value in values if value is not None]
        # The sum is for a NaN, which min and max may pass over.
        return not known or (
            span.low <= min(known) and max(known) <= span.high and sum(known) <= span.high * len(known)
        )

    return fits


def _dict_of(kind: Any) -> _Check:
    inner = _check_of(kind)

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise _Wrong("an object", value)
        name = ""
        try:
            for name, item in value.items():  # noqa: B007
                inner(item)
        except _Wrong as wrong:
            wrong.where = f".{name}{wrong.where}"
            raise

    return check


def _object_of(kind: Any) -> _Check:
    fields = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marked = get_origin(hint) in (Required, NotRequired)
        required = get_origin(hint) is Required or (kind.__total__ and not marked)
        fields.append((name, _check_of(get_args(hint)[0] if marked else hint), required))

    def check(value: Any) -> None:
        if type(value) is not dict:
            raise _Wrong("an object", value)
        for name, inner, required in fields:
            if name in value:
                try:
                    inner(value[name])
                except _Wrong as wrong:
                    wrong.where = f".{name}{wrong.where}"
                    raise
            elif required:
                missing = _Wrong("", None)
                missing.where = f".{name}"
                raise missing

    return check


def _words(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _words(get_args(kind)[0])
    names: dict[Any, str] = {
        str: "a text", bool: "true or false", int: "a whole number", float: "a number", NoneType: "null",
        list: "a list",
    }  # fmt: skip
    return names.get(get_origin(kind) or kind, "an object")


def _shown(value: Any) -> str:
    """A value in a message: short, and in ASCII."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1e18:
        return "a very large number"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
