"""What the settings of all programs share: each is a frozen dataclass, checked when it is made.

The same class serves Python and the command line: `generate(GenerateSettings(model=..., prompts=...))` is what
`xattn-video generate --model ... --prompts ...` runs. `program.py` makes the options; this module needs no package
beside the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from xattn_video_pipelines.common.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from xattn_video import XAttnConfig


@dataclass(frozen=True)
class Option:
    """The text of a setting in `--help`, given in its annotation: `Annotated[int | None, Option("pixels")]`.

    The name of the option comes from the field: `num_frames` is `--num-frames`. A field that need not be given by name
    in Python is positional on the command line too; with `named` its name does as well. A switch that is on by default,
    such as `lpips`, becomes `--no-lpips`, and its text says what that does. `commas` says that a list of texts may also
    be written with commas, as all lists of numbers and of choices may. A setting that is `command_line_only` is not
    taken from a file of settings, which may be somebody else's: it could run foreign code or replace any file.
    """

    help: str
    group: str | None = None
    metavar: str | None = None
    commas: bool = False
    command_line_only: bool = False
    named: bool = False


# Floating-point types, by their names in torch; each may also be given by its short name.
Dtype = Literal["bfloat16", "float16", "float32"]
DtypeOrAuto = Literal["auto", "bfloat16", "float16", "float32"]
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Settings:
    """Base of all settings. `check` is called once, when the settings are made."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            choices, given = choices_of(hints[field.name]), getattr(self, field.name)
            if "bfloat16" in choices:
                given = tuple(map(long_dtype, given)) if isinstance(given, tuple) else long_dtype(given)
                object.__setattr__(self, field.name, given)
            for value in given if isinstance(given, tuple) else (given,):
                if choices and value is not None and value not in choices:
                    listed = ", ".join(choices)
                    hint = did_you_mean(str(value), choices)
                    raise UserError(f"{option_name(field.name)} must be one of {listed}, got {value!r}{hint}")
        self.check()

    def arguments(self) -> list[str]:
        """The arguments of the command line that make these settings; those that are as by default are left out."""
        words: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            given = [str(one) for one in (value if isinstance(value, tuple) else (value,))]
            if not field.kw_only:
                words += [] if value is None else given
            elif isinstance(value, bool) and value != field.default:
                words.append(option_name(field.name if value else f"no_{field.name}"))
            elif value != field.default:
                words += [option_name(field.name), *given]
        return words

    def check(self) -> None:
        """Raise UserError for a value that is out of its range. The message names option, rule and value."""

    def check_at_least(self, least: int, *names: str) -> None:
        """Raise UserError unless each of these settings, where it is given, is `least` or more.

        A setting with several values is checked value by value.
        """
        for name in names:
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value is not None and value < least:
                    raise UserError(f"{option_name(name)} must be {least} or more, got {value}")

    def check_at_most(self, most: int, *names: str) -> None:
        """Raise UserError unless each of these settings, where it is given, is `most` or less."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value > most:
                raise UserError(f"{option_name(name)} must be {most} or less, got {value}")

    def check_from_zero(self, *names: str) -> None:
        """Raise UserError unless each of these settings, where it is given, is a finite number from 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{option_name(name)} must be a number from 0, got {value}")


def options_of(settings: type[Settings]) -> dict[str, Option]:
    """The option of each setting, by the field's name."""
    hints = get_type_hints(settings, include_extras=True)
    return {field.name: option_of(hints[field.name]) for field in fields(settings)}


def option_of(hint: Any) -> Option:
    """The Option in an annotation. Raises TypeError if there is none."""
    for extra in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        if isinstance(extra, Option):
            return extra
    raise TypeError(f"needs an Option with its help text in its annotation, got {hint!r}")


def long_dtype(name: Any) -> Any:
    """The name that torch has for a floating-point type; what is no short name stays as it is.

    >>> long_dtype("bf16")
    'bfloat16'
    """
    return SHORT_DTYPES.get(name, name) if isinstance(name, str) else name


def short_dtype(name: str) -> str:
    """The name that the rows of measurements have for a floating-point type: `bf16` for `bfloat16`."""
    return {long: short for short, long in SHORT_DTYPES.items()}.get(name, name)


def choices_of(hint: Any) -> tuple[str, ...]:
    """The words that a setting may be: those of a Literal, also in a tuple or beside None. () if any will do."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for part in get_args(hint) if (found := choices_of(part))), ())


def option_name(field: str) -> str:
    """The command line's spelling of a setting: `--num-frames` for `num_frames`."""
    return f"--{field.replace('_', '-')}"


def sparse_config(preset: str | None = None, **values: Any) -> XAttnConfig:
    """`XAttnConfig(**values)`, or the preset with these values in place of its own.

    Raises:
        UserError: a value is out of its range or of a wrong type, or a name is no setting or no preset.
    """
    from xattn_video import XAttnConfig

    try:
        return XAttnConfig.from_dict(values) if preset is None else XAttnConfig.preset(preset, **values)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None


# The time that a run over many items may take.
MaxHours = Annotated[
    float | None,
    Option("begin nothing that would likely end later than N hours from now; the same command goes on", metavar="N"),
]


def check_max_hours(hours: float | None) -> None:
    """Raise UserError unless it is None or a positive number."""
    if hours is not None and not 0 < hours < math.inf:
        raise UserError(f"--max-hours must be a positive number, got {hours:g}")


# What the help of every command calls the options that say what is printed.
OUTPUT = "output"
# What `--json` says in every program that has it.
Json = Annotated[bool, Option("print the result as one JSON document, and nothing else on stdout", OUTPUT)]
