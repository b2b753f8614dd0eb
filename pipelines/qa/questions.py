"""Questions about videos: what a file of them may hold, how one is put to a model, and when an answer is right."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xattn_video_pipelines.common.errors import UserError
from xattn_video_pipelines.common.files import read_input
from xattn_video_pipelines.common.schema import parse_json
from xattn_video_pipelines.qa import choices

LETTERS = string.ascii_uppercase
# What stands around words without being of them.
_AROUND = ".,;:!?\"'`*_()[]{}\u2018\u2019\u201c\u201d\u2026"
_REASONING = "(?:think|thinking|thought|reasoning)"
_KEYS = {"video", "question", "options", "answer", "id"}
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Question:
    """One question about a video.

    `answer` is the right one, None where it is not given: with options the letter of one of them, else a text.
    """

    id: str
    video: Path
    question: str
    options: tuple[str, ...] = ()
    answer: str | None = None

    @property
    def prompt(self) -> str:
        """What the model is asked, options included."""
        if not self.options:
            return self.question
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return f"{self.question}\n{listed}\nAnswer with the letter of the right option alone."

    def right(self, reply: str) -> bool | None:
        """Whether a reply is the answer; None where none is given.

        With options its choice counts, see `chosen`. Without them all that it says after its reasoning, apart from
        case, articles and what stands around its words.
        """
        if self.answer is None:
            return None
        if not self.options:
            return _plain(conclusion(reply)) == _plain(self.answer)
        return self.chosen(reply) == self.answer

    def unreadable(self, reply: str) -> bool:
        """Whether a reply says nothing that could be right or wrong: no choice among options, or only reasoning."""
        return self.chosen(reply) is None if self.options else not conclusion(reply)

    def same(self, reply: str, other: str) -> bool:
        """Whether two replies say the same: with options make the same choice, else have the same words."""
        if self.options and (letters := (self.chosen(reply), self.chosen(other))) != (None, None):
            return letters[0] == letters[1]
        return conclusion(reply) == conclusion(other)

    def chosen(self, reply: str) -> str | None:
        """The letter that a reply to a question with options chooses, or None.

        What counts, in this order, in what the reply says after its reasoning:

        1. the last "answer is B", "answer: b" or `\\boxed{B}`;
        2. a letter alone or in front ("b", "(B)", "b) a cat"), unless the reply lists several options;
        3. the one option whose text the reply is;
        4. the last letter that stands alone ("so it is B", "option b").

        Letters that the reply rejects ("not A", "rules out C", "D is wrong"), articles, "I" and names ("Apartment B")
        do not count, and a choice of two ("A or B") is none.
        """
        letters, said = LETTERS[: len(self.options)], conclusion(reply)
        same = [letter for letter, option in zip(letters, self.options, strict=True) if _plain(option) == _plain(said)]
        return choices.chosen(said, letters, same[0] if len(same) == 1 else None)


def conclusion(reply: str) -> str:
    """What a reply says after its reasoning, `<think>...</think>`; nothing where the reasoning has no end."""
    after = re.split(rf"</{_REASONING}>", reply, flags=re.IGNORECASE)[-1]
    return re.split(rf"<{_REASONING}>", after, flags=re.IGNORECASE)[0].strip()


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions: a JSON object a line with `video` (a path relative to the file) and `question`, and
    if wanted `options` (a list of texts), `answer` (a letter or an option's text; without options any text) and `id`.

    Raises:
        UserError: the file is missing or empty, or a line is broken; the message names file and line.
    """
    try:
        # With or without the mark that some editors put first.
        text = read_input(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    questions: dict[str, Question] = {}
    # JSON may hold other signs that end a line, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            question = _question(path, number, line, f"{len(questions) + 1:04d}")
            if question.id in questions:
                raise UserError(f"{path}:{number}: the id {question.id!r} is already taken")
            questions[question.id] = question
    if not questions:
        raise UserError(f"{path}: no question in it")
    return list(questions.values())


def check_text(what: str, *texts: Any) -> None:
    """Raise UserError for a text, alone or in a list, that holds half of a surrogate pair; what is no text passes.

    No tokenizer takes one. JSON can spell it, and so can a command line that is not in UTF-8.
    """
    for text in texts:
        if isinstance(text, (list, tuple)):
            check_text(what, *text)
        elif isinstance(text, str) and any("\ud800" <= sign <= "\udfff" for sign in text):
            raise UserError(f"{what} holds half of a surrogate pair, which is no text: {text!a}")


def check_options(where: str, options: Any) -> tuple[str, ...]:
    """Options as a tuple. Raises UserError unless they are two or more different texts, one a letter at most."""
    if not isinstance(options, (list, tuple)) or any(not isinstance(option, str) for option in options):
        raise UserError(f"{where}: options must be a list of texts")
    if len(options) == 1 or len(set(options)) != len(options) or not all(option.strip() for option in options):
        raise UserError(f"{where}: options must be two or more different texts")
    if len(options) > len(LETTERS):
        raise UserError(f"{where}: {len(options)} options, but only {len(LETTERS)} letters")
    return tuple(options)


def check_answer(where: str, answer: Any, options: tuple[str, ...]) -> str | None:
    """The answer, with options as a letter. Raises UserError where it is none of them."""
    if answer is None:
        return None
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: answer must be a text")
    if not options:
        return answer
    if answer in options:
        return LETTERS[options.index(answer)]
    if answer.upper() in LETTERS[: len(options)] and len(answer) == 1:
        return answer.upper()
    raise UserError(f"{where}: answer must be one of the options or its letter, got {answer!r}")


def _question(path: Path, number: int, line: str, default_id: str) -> Question:
    where = f"{path}:{number}"
    try:
        values = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a JSON object")
    if unknown := sorted(set(values) - _KEYS):
        raise UserError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    for name in ("video", "question"):
        if not isinstance(values.get(name), str) or not values[name].strip():
            raise UserError(f"{where}: needs {name}, a text")
    for name in ("video", "question", "options", "answer"):
        check_text(f"{where}: {name}", values.get(name))
    id = default_id if values.get("id") is None else values["id"]
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise UserError(f"{where}: id must be letters, digits, '.', '_' or '-', got {id!r}")
    video = path.parent / values["video"]
    if not video.is_file():
        raise UserError(f"{where}: no such video file: {video}")
    given = values.get("options")
    options = check_options(where, [] if given is None else given)
    return Question(id, video, values["question"], options, check_answer(where, values.get("answer"), options))


def _plain(text: str) -> str:
    """Words in lower case, without articles and what stands around them; numbers keep sign and point.

    A text without words, such as "?", stays.
    """
    parted = re.sub(r"(?<=[^\W\d_])[-/](?=[^\W\d_])", " ", text.lower())
    words = [word.strip(_AROUND) for word in parted.split()]
    return " ".join(word for word in words if word and word not in ("a", "an", "the")) or text.strip().lower()
