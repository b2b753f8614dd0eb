"""What all command lines share: options made from settings, one line for bad input, an example under every `--help`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, get_args, get_origin, get_type_hints

from xattn_video.extras import explain
from xattn_video_pipelines.common.errors import UserError, did_you_mean, one_line
from xattn_video_pipelines.common.run_file import RUN_FILE, read_run, run_text, running
from xattn_video_pipelines.common.settings import (
    OUTPUT,
    Option,
    Settings,
    choices_of,
    long_dtype,
    option_name,
    option_of,
)
from xattn_video_pipelines.common.terminal import is_verbose, loudness, printable, say

if TYPE_CHECKING:
    from cyclopts import App, ArgumentCollection, CycloptsError, Token

# Under the help of every command.
EXIT_CODES = """\
exit codes: 0 all is well; 1 what was checked is not well (bench, tune, doctor); 2 bad input, in one line;
3 some items failed and the others are made, the same command tries them again; 130 stopped by Ctrl-C"""

# Characters of a message about an error: no message of this project's own words has as many.
_LONGEST = 2000


class UsageError(UserError):
    """The command line cannot be read; `command` is what was called, such as `xattn-video generate`."""

    def __init__(self, command: str, message: str) -> None:
        super().__init__(f"{message} (see: {command} --help)")


def program(name: str, about: str, example: str, version: Callable[[], str] | None = None) -> App:
    """A command line without commands yet, for `add_command` and `run_app`, which `guarded` calls.

    Args:
        name: what the user calls it, such as `xattn-video`.
        about: what it is for; shown in `--help`.
        example: at least one command that works; shown at the end of `--help`.
        version: gives what `--version` prints; None leaves that option out.

    Raises:
        UserError: the library that reads command lines is not installed.
    """
    try:
        from cyclopts import App, Group, Parameter
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise UserError(f"the command line needs it: {explain(error) or error}") from None
    return App(
        name,
        help=about,
        help_epilogue=example.rstrip(),
        help_format="plaintext",
        help_formatter=_help_formatter(),
        # An example must stay in one line, so that it can be copied.
        console=Console(soft_wrap=True),
        version=version,
        version_flags=("--version",) if version else (),
        default_parameter=Parameter(
            consume_multiple=(1, None), negative=(), allow_repeating=True, show_default=_shown_default
        ),
        result_action="return_value",
        group_arguments=Group.create_ordered("Arguments"),
        group_parameters=Group.create_ordered("Options"),
        # `guarded` says what is wrong, in one line.
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )


def add_command(app: App, run: Callable[..., int], name: str, about: str, example: str, place: int = 0) -> None:
    """Make a subcommand of a function.

    Args:
        app: of `program`.
        run: `run(settings: SomeSettings, *, json: Annotated[bool, Option("...")] = False) -> exit code`. Each field of
            the settings becomes an option, and so does each parameter beside them. Settings may be missing.
        name, about, example: as of `program`.
        place: commands are listed in the order of this number.
    """
    settings, call = _settings_of(run), _flat(run, name)
    app.command(
        call,
        name=name,
        help=about,
        help_epilogue=f"{example.rstrip()}\n\n{EXIT_CODES}",
        help_formatter=_help_formatter(_optional_places(call)),
        sort_key=place,
        config=functools.partial(_take_from_file, name, settings) if settings else (),
    )


def run_app(app: App, arguments: Sequence[str], commands: Sequence[str] = ()) -> int:
    """Read `arguments` and run the command that they name, one of `commands` where there are any; its exit code.

    Raises:
        UsageError: the arguments cannot be read.
    """
    from cyclopts import CycloptsError

    name = app.name[0]
    command = asked_command(arguments)
    if commands and command is None:
        _check_options(app, name, arguments)
    if commands and command is None and not {"-h", "--help", "--version"}.intersection(arguments):
        raise UsageError(name, "the following arguments are required: COMMAND")
    if commands and command is not None and command not in commands:
        listed = did_you_mean(command, commands) or f" (choose from {', '.join(map(repr, commands))})"
        raise UsageError(name, f"argument COMMAND: invalid choice: {command!r}{listed}")
    if command is not None and commands:
        _check_options(app[command], f"{name} {command}", arguments)
    elif app.default_command is not None:
        _check_options(app, name, arguments)
    try:
        return app(list(arguments)) or 0
    except CycloptsError as error:
        raise UsageError(" ".join([name, *(error.command_chain or ())]), _message(error)) from None


def asked_command(arguments: Sequence[str]) -> str | None:
    """The command that a command line names: its first word."""
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def run_alone(run: Callable[..., int], module: str, about: str, example: str, arguments: Sequence[str] | None) -> int:
    """Run a function, as of `add_command`, as `python -m MODULE`; returns the exit code, as of `guarded`.

    Args:
        arguments: of the command line; None takes the process's own.
    """

    def call() -> int:
        app = program(f"python -m {module}", about, f"{example.rstrip()}\n\n{EXIT_CODES}")
        app.default(_flat(run, None))
        return run_app(app, sys.argv[1:] if arguments is None else arguments)

    return guarded(module.rpartition(".")[2], call)


def guarded(name: str, call: Callable[[], int]) -> int:
    """Run a program; what goes wrong is one line on stderr that begins with the program's name.

    Returns:
        What `call` gives, 2 for bad input, 130 for Ctrl-C, 141 for a reader of stdout that has left.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a prompt may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        code = call()
        # what fails now would fail at exit, where nobody can say why
        sys.stdout.flush()
        return code
    except UserError as error:
        _complain(name, error)
        return 2
    except ModuleNotFoundError as error:
        line = explain(error)
        if line is None:
            raise
        _complain(name, line)
        return 2
    except KeyboardInterrupt:
        print(
            f"{name}: stopped; what is finished under --out is kept, and the same command goes on",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _complain(name, f"{str(error.filename)[:60]}...: the name is too long")
            return 2
        if error.filename is not None:
            _complain(name, f"{error.filename}: {error.strerror or error}")
            return 2
        # The reader of stdout (head, less) has left, or its disk is full; Python must not try again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        _complain(name, error.strerror or error)
        return 2


def _complain(name: str, message: object) -> None:
    """The one line on stderr. It may quote what others wrote, which may be long."""
    line = printable(one_line(message))
    print(f"{name}: error: {line if len(line) <= _LONGEST else line[:_LONGEST] + '...'}", file=sys.stderr)


class _Log(io.FileIO):
    """stderr, written as far as it goes: a full disk, or a reader that has left, must not end hours of work."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def _open_closed_streams() -> None:
    """Make stdin, stdout and stderr safe to use where a caller has closed them or their disk is full.

    A closed number would be given to the next file that is opened, such as a manifest, and what is printed then goes
    into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        encoding = getattr(sys.stderr, "encoding", "utf-8")
        raw = io.BufferedWriter(_Log(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True, write_through=True)


def for_people(json: bool) -> TextIO:
    """Where a program prints what is for people: with `--json` stdout holds the document and nothing else."""
    return sys.stderr if json else sys.stdout


# --- options from settings ------------------------------------------------------------------------------------


# Options that every command has, beside those of its settings.
_Config = Annotated[
    Path | None, Option(f"take settings from this file, such as the {RUN_FILE} of a run; options win", metavar="FILE")
]
_Quiet = Annotated[bool, Option("print results and errors, and no progress", OUTPUT)]
_Verbose = Annotated[bool, Option("print the settings first, and where in the code an error comes from", OUTPUT)]


def _settings_of(run: Callable[..., int]) -> type[Settings] | None:
    """The class of a command's settings, if it has any."""
    hints = get_type_hints(run).values()
    return next((hint for hint in hints if isinstance(hint, type) and issubclass(hint, Settings)), None)


def _flat(run: Callable[..., int], command: str | None) -> Callable[..., int]:
    """`run` with a parameter for each field of its settings, annotated as cyclopts reads it.

    Args:
        run: as of `add_command`.
        command: its name, under which a file has its settings; None for a program that takes no such file.
    """
    hints = get_type_hints(run, include_extras=True)
    hints.pop("return", None)
    groups = functools.cache(_group)
    parameters: list[inspect.Parameter] = []
    settings_name, settings_class, off = "", Settings, {}
    for name, parameter in inspect.signature(run).parameters.items():
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, Settings):
            settings_name, settings_class = name, hint
            own = get_type_hints(hint, include_extras=True)
            for field in fields(hint):
                made = _parameter(field.name, own[field.name], field.default, not field.kw_only, groups)
                parameters.append(made)
                if made.name != field.name:
                    off[made.name] = field.name
            if command is not None:
                parameters.append(_parameter("config", _Config, None, False, groups))
        else:
            default = MISSING if parameter.default is parameter.empty else parameter.default
            parameters.append(_parameter(name, hint, default, False, groups))
    parameters.append(_parameter("quiet", _Quiet, False, False, groups, short="-q"))
    parameters.append(_parameter("verbose", _Verbose, False, False, groups, short="-v"))
    positional = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]

    def call(*places: Any, **named: Any) -> int:
        values = dict(zip(positional, places, strict=False)) | named
        values |= {field: not values.pop(switch) for switch, field in off.items() if switch in values}
        # What it held is among the values already.
        values.pop("config", None)
        with loudness(quiet=values.pop("quiet", False), verbose=values.pop("verbose", False)), _told_where():
            if not settings_name:
                return run(**values)
            own = {field.name: values.pop(field.name) for field in fields(settings_class) if field.name in values}
            settings = settings_class(**own)
            if command is None:
                return run(settings, **values)
            if is_verbose():
                # Without the comment at its head, which is about a file.
                say(run_text(command, settings).partition("\n\n")[2], sys.stderr)
            with running(command, settings):
                return run(settings, **values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


@contextlib.contextmanager
def _told_where() -> Iterator[None]:
    """With `--verbose`: where in the code an error comes from, before the one line about it."""
    try:
        yield
    except Exception as error:
        if is_verbose():
            say("".join(traceback.format_exception(error)), sys.stderr)
        raise


def _take_from_file(
    command: str, settings: type[Settings], app: App, commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    """Give the arguments that the command line leaves out what the file of `--config` says.

    Raises:
        UserError: as `read_run`.
    """
    from cyclopts import Token

    by_name = {argument.field_info.name: argument for argument in arguments}
    given = by_name["config"].tokens
    if not given:
        return
    path = Path(given[-1].value)
    for name, value in read_run(path, command, settings).items():
        argument = by_name[name if name in by_name else f"no_{name}"]
        if argument.tokens:
            continue
        several = get_origin(argument.hint) is tuple
        is_switch = argument.hint in (bool, bool | None)
        if several and not isinstance(value, list):
            value = [value]
        if isinstance(value, list) != several or isinstance(value, bool) != is_switch:
            kind = "true or false" if is_switch else "one value, and not true or false"
            raise UserError(f"--config {path}: {name} must be {kind}, got {value!r}")
        source: dict[str, Any] = {"keyword": option_name(name), "source": str(path)}
        if isinstance(value, bool):
            argument.append(Token(implicit_value=value == (name in by_name), **source))
            continue
        for index, one in enumerate(value if isinstance(value, list) else [value]):
            argument.append(Token(value=str(one), index=index, **source))


def _parameter(
    name: str, hint: Any, default: Any, positional: bool, groups: Callable[[str], Any], short: str | None = None
) -> inspect.Parameter:
    from cyclopts import Parameter

    option, kind = option_of(hint), get_args(hint)[0]
    if default is True:
        name, default = f"no_{name}", False
    many = get_origin(kind) is tuple
    metavar = f"{option.metavar or _metavar(kind)}{'...' if many else ''}"
    shown: dict[str, Any] = {"help": option.help, "metavar": metavar}
    if option.command_line_only:
        shown["help"] += "; never taken from --config"
    if kind == (bool | None):
        # Its default may be yes or no, so both can be given.
        shown["negative"] = f"--no-{name.replace('_', '-')}"
    if kind not in (bool, bool | None) and not (many and positional):
        texts = many and not choices_of(kind) and get_args(kind)[0] in (str, Path)
        shown["converter"] = functools.partial(_converted, commas=option.commas or not texts)
    if option.group is not None:
        shown["group"] = groups(option.group)
    if positional and not option.named:
        shown["name"] = metavar
    elif short is not None:
        shown["name"] = (option_name(name), short)
    by_place = inspect.Parameter.POSITIONAL_OR_KEYWORD if option.named else inspect.Parameter.POSITIONAL_ONLY
    return inspect.Parameter(
        name,
        by_place if positional else inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, Parameter(**shown)],
    )


def _metavar(kind: Any) -> str:
    """What stands for a value in `--help`, where its option does not say it."""
    if choices_of(kind):
        return "CHOICE"
    kinds = get_args(kind) or (kind,)
    return "N" if int in kinds or float in kinds else "PATH" if Path in kinds else "NAME"


def _converted(kind: Any, tokens: Sequence[Token], *, commas: bool) -> Any:
    """The value of an option. Of a list that is given twice the last one counts, as for an option with one value; but
    texts and paths, which people give one by one (`--lora A --lora B`), add up.

    Args:
        kind: the type of the value.
        tokens: what was given.
        commas: whether the items of a list may be separated by commas too.
    """
    from cyclopts import CoercionError, convert

    if commas and get_origin(kind) is tuple:
        tokens = tokens[max(place for place, token in enumerate(tokens) if token.index == 0) :]
        tokens = [token.evolve(value=part) for token in tokens for part in re.split(r",\s*", token.value) if part]
    kinds = get_args(kind) or (kind,)
    for token in tokens:
        # cyclopts would cut 8.5 to 8, and an empty text is the path of this folder.
        if (int in kinds and not re.fullmatch(r"[+-]?\d+", token.value)) or (Path in kinds and not token.value):
            raise CoercionError(token=token, target_type=int if int in kinds else Path)
    if "bfloat16" in choices_of(kind):
        tokens = [token.evolve(value=long_dtype(token.value)) for token in tokens]
    return convert(kind, tokens)


def _group(title: str) -> Any:
    """A part of `--help` under a title; parts come in the order in which they are first named."""
    from cyclopts import Group

    return Group.create_ordered(title)


def _shown_default(value: Any) -> str | None:
    """What `--help` says of a default; None says nothing, as for what is off or left to the program."""
    if value is None or value is False or value == ():
        return None
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _optional_places(call: Callable[..., int]) -> str:
    """The arguments without an option that may be left out, as a usage line has them: "[PROMPT...]"."""
    parameters = inspect.signature(call).parameters.values()
    optional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is not p.empty]
    # What is an option too has its name there, as in the table below.
    names = [
        f"{p.name.upper()}..." if p.kind is p.POSITIONAL_OR_KEYWORD else get_args(p.annotation)[1].metavar
        for p in optional
    ]
    return " ".join(f"[{name}]" for name in names)


def _help_formatter(optional_places: str = "") -> Any:
    """Columns under a rule with the part's title, and a usage line in lower case as of most programs.

    Args:
        optional_places: what the usage line has in place of "[ARGS]".
    """
    from cyclopts.help import DefaultFormatter, PanelSpec
    from rich.box import Box

    class Formatter(DefaultFormatter):
        def render_usage(self, console: Any, options: Any, usage: Any) -> None:
            console.print(f"usage: {usage}".replace("[ARGS]", optional_places), highlight=False, markup=False)

    # a rule with the title above, nothing at the sides and below
    box = Box("─── \n" + 7 * "    \n")
    return Formatter(panel_spec=PanelSpec(box=box, padding=(0, 0)))


# --- what is wrong with a command line ------------------------------------------------------------------------


def _message(error: CycloptsError) -> str:
    """What is wrong, in one line and in the words of argparse, which users of Python programs know."""
    from cyclopts import CoercionError, MissingArgumentError, UnknownOptionError, UnusedCliTokensError

    argument = error.argument
    if isinstance(error, UnknownOptionError):
        word = str(error.token.keyword or error.token.value)
        return _unrecognized(word, (name for known in error.argument_collection for name in known.names))
    if isinstance(error, UnusedCliTokensError):
        return f"unrecognized arguments: {' '.join(error.unused_tokens or [])}"
    if argument is None:
        return str(error)
    if isinstance(error, MissingArgumentError):
        if error.keyword is None and not argument.tokens:
            return f"the following arguments are required: {argument.name}"
        expected = "at least one argument" if get_origin(argument.hint) is tuple else "one argument"
        return f"argument {error.keyword or argument.name}: expected {expected}"
    if isinstance(error, CoercionError) and error.token is not None:
        value, source = error.token.value, "" if error.token.source == "cli" else f" in {error.token.source}"
        choices = choices_of(argument.hint)
        if choices:
            listed = ", ".join(map(repr, choices))
            return (
                f"argument {argument.name}: invalid choice: {value!r}{source} (choose from {listed})"
                f"{did_you_mean(value, choices)}"
            )
        kind = getattr(error.target_type, "__name__", error.target_type)
        return f"argument {argument.name}: invalid {kind} value: {value!r}{source}"
    return str(error)


def _check_options(app: App, name: str, arguments: Sequence[str]) -> None:
    """Raise UsageError for an option that there is not: the first thing to say, as it may be a required one."""
    known = [*app.help_flags, *app.version_flags]
    if app.default_command is not None:
        known += [name for argument in app.assemble_argument_collection() for name in argument.names]
    for word in arguments:
        if word == "--":
            return
        option = word.partition("=")[0]
        one_dash = re.fullmatch(r"-[a-z][a-z-]+", option) and not {f"-{letter}" for letter in option[1:]} <= {*known}
        if (option.startswith("--") and option not in known) or one_dash:
            raise UsageError(name, _unrecognized(word, known))


def _unrecognized(word: str, known: Iterable[str]) -> str:
    """The message about an option that there is not."""
    name = word.partition("=")[0]
    # One dash may be one too few.
    return f"unrecognized arguments: {word}{did_you_mean(name if name.startswith('--') else f'-{name}', known)}"


# --- programs with a parser of argparse -----------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A usage error in one line, as for every other bad input; `--help` keeps the lines of its texts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        usual = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **{**usual, **kwargs})

    @property
    def program(self) -> str:
        """What the user calls it: "xattn-video", and "contact_sheet" for "python -m PACKAGE.contact_sheet"."""
        first, *rest = self.prog.split()
        return rest[1].rpartition(".")[2] if first == "python" else first

    def error(self, message: str) -> NoReturn:
        wrong, _, word = message.partition(": ")
        if wrong == "unrecognized arguments":
            message = _unrecognized(word, self._option_string_actions)
        self.exit(2, f"{self.program}: error: {message} (see: {self.prog} --help)\n")


def run_program(
    parser: Parser, run: Callable[[argparse.Namespace], int], arguments: Sequence[str] | None = None
) -> int:
    """Parse `arguments` (None: the process's own) and run; returns the exit code, as of `guarded`."""
    return guarded(parser.program, lambda: run(parser.parse_args(arguments)))
