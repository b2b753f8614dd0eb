"""Which of several letters a model's reply chooses: the rules, in the order in which `chosen` tries them."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

# Between a letter and these words it cannot be an article: "A is right".
_AFTER_LETTER = "is|was|has|seems|looks|appears|fits|matches|must|should|would|because|since|as|and|or|nor|then"
# What comes before a letter as a part of a name. Other names begin with a capital within a sentence.
_NAME = re.compile(
    "apartment|area|block|box|building|button|camera|class|column|door|figure|flat|floor|gate|group|grade|hall|house|"
    "image|lane|level|line|man|panel|part|person|phase|picture|plan|platform|player|point|road|room|row|scene|section|"
    "side|speaker|stage|street|table|team|terminal|type|unit|vitamin|wing|woman|zone"
)
_CHOOSING = re.compile("answers?|options?|choices?|letters?|is|be|choose|select|pick")
# What may stand between "answer" and its letter.
_LINK = r"[\s:=>*_(\[{\"'`<\-\u2013\u2014\uff1a\u2192]*"
_FILLER = (
    "the|here|therefore|thus|then|must|should|would|will|could|be|is|was|has|likely|probably|clearly|definitely|most|"
    "correct|right|best|final|indeed"
)
_REJECTING = (
    r"\b(?:not(?: be| (?:think|believe) (?:that )?(?:it is|it['\u2019]s|it))?|cannot be|neither|nor|"
    r"rul(?:e|es|ed|ing) out|eliminat\w+|exclud\w+|reject\w*|discard\w*|dismiss\w*|instead of|rather than|unlike|"
    r"other than|except(?: for)?|without|none of)"
    r"|n['\u2019]t(?: be| (?:think|believe) (?:that )?(?:it is|it['\u2019]s|it))?"
    r"|\u4e0d\u662f|\u4e0d\u9009|\u6392\u9664"
)
_BEFORE_REJECTED = r"(?:\s|(?:the|both|either|options?|answers?|choices?|letters?)\b)*[(\"'*]{0,3}"
_REJECTED = (
    r"(?:\s*\([^()\n]{1,80}\))?[)\"'*]{0,3}(?:\s*[:(\-]?\s*(?:wrong|incorrect|false)\b"
    r"|\s+(?:is|are|was|were|seems?|looks?|does|do|can|could|would|must)"
    r"(?:\s+(?:be|also|both|clearly|simply|therefore|thus|definitely))*"
    r"\s+(?:wrong|incorrect|false|impossible|excluded|eliminated|ruled out|out|not)\b"
    r"|\s+(?:is|are|was|do|does|ca|could|would|wo)n['\u2019]t\b|\s+cannot\b)"
)


@dataclass(frozen=True)
class _Found:
    """A letter that stands alone, and where."""

    letter: str
    start: int
    end: int


def chosen(said: str, letters: str, same: str | None) -> str | None:
    """The letter that is chosen, or None.

    Args:
        said: what the reply says after its reasoning.
        letters: those of the options, such as `ABCD`.
        same: the letter of the option whose text `said` is, if it is one.
    """
    text = _without_rejected(_with_capitals(said, letters), letters)
    lines = text.split("\n")
    listed = [match[1].upper() if (match := _leading(line, letters)) else None for line in lines]
    several = len(set(listed) - {None}) > 1 or len(set(re.findall(rf"(?<!\w)([{letters}])[):]", text))) > 1
    found = _standing_alone(text, letters)
    if explicit := _explicit(text, letters):
        return None if _joined(text, found, explicit) else explicit.letter
    if not several and (leading := _leading(text, letters)):
        return leading[1].upper()
    if same is not None:
        return same
    if several:
        # Only what is said beside the list.
        text = "\n".join(line for line, letter in zip(lines, listed, strict=True) if letter is None)
        found = _standing_alone(text, letters)
    if not found or _joined(text, found, found[-1]):
        return None
    return found[-1].letter


def _with_capitals(said: str, letters: str) -> str:
    """Small letters that are options by what stands around them, as capitals: "option b", "(b)"."""
    small = f"[{letters.lower()}]"
    after = rf"(?=\s*(?:[).,:;!?\]*\"'`]|$)|\s+(?:{_AFTER_LETTER})\b)"
    named = rf"\b(?:options?|choices?|letters?)[\s:*(\"']{{1,4}}{small}{after}"
    said = re.sub(named, lambda match: match[0][:-1] + match[0][-1].upper(), said, flags=re.IGNORECASE | re.MULTILINE)
    return re.sub(rf"[(\[]{small}[)\]]", lambda match: match[0].upper(), said)


def _alone(letters: str) -> str:
    """A pattern for a capital that is no part of a word, an abbreviation or another name such as C++."""
    return rf"(?<![A-Za-z0-9_'\u2019])(?<![A-Za-z][.\-])[{letters}](?![A-Za-z0-9_'\u2019+#]|[.\-][A-Za-z0-9])"


def _without_rejected(text: str, letters: str) -> str:
    """The text with spaces in place of letters that it says are wrong."""
    one = _alone(letters)
    several = rf"{one}(?:(?:\s*,\s*{one}){{0,8}}\s*,?\s*(?:and|or|nor|&|/)\s*{one}(?!\s+(?:is|fits|matches|must)\b))?"
    for pattern in (rf"(?i:{_REJECTING})(?i:{_BEFORE_REJECTED}){several}", rf"{several}(?i:{_REJECTED})"):
        text = re.sub(pattern, lambda match: " " * len(match[0]), text)
    return text


def _leading(text: str, letters: str) -> re.Match[str] | None:
    """A letter alone or in front: "b", "(B)", "b) a cat"."""
    return re.match(rf"[\W_]*([{letters}])\s*(?:[):\]]|[-\u2013\u2014]\s|\.(?![A-Za-z]\.)|\W*$)", text, re.IGNORECASE)


def _explicit(text: str, letters: str) -> _Found | None:
    """The last "answer is B", "answer: b" or `\\boxed{B}`. A small letter must end its part of the sentence."""
    said = rf"(?:\banswers?\b|\\boxed|\\text|\u7b54\u6848[\u662f\u4e3a]?)(?:\s+(?:{_FILLER})\b)*{_LINK}"
    said += rf"(?:(?:option|choice|letter)\b{_LINK})?"
    small = rf"(?<![A-Za-z])[{letters.lower()}](?=\s*(?:[).,:;!?\]}}*\"'`<]|$))"
    last = None
    for match in re.finditer(rf"{said}(?-i:({_alone(letters)})|({small}))", text, re.IGNORECASE | re.MULTILINE):
        if match[2] or not _is_word(text, match[1], match.end()):
            last = _Found((match[1] or match[2]).upper(), match.end() - 1, match.end())
    return last


def _is_word(text: str, letter: str, end: int) -> bool:
    """Whether a capital that ends there is an article or "I", by the word after it."""
    return letter in "AI" and re.match(rf"\s+(?!(?:{_AFTER_LETTER})\b)[a-z]", text[end:]) is not None


def _standing_alone(text: str, letters: str) -> list[_Found]:
    """The capitals that stand alone and are neither an article nor "I" nor a part of a name."""
    found = []
    for match in re.finditer(_alone(letters), text):
        # A part is enough, and all of a long reply for each of its letters would take long.
        before = text[max(match.start() - 80, 0) : match.start()]
        starts = re.search(r"(?:^|[.!?:])[\s*\-]*$", before, re.MULTILINE) is not None
        word = _is_word(text, match[0], match.end()) and (match[0] == "I" or starts)
        if not word and not _ends_in_a_name(before):
            found.append(_Found(match[0], match.start(), match.end()))
    return found


def _ends_in_a_name(before: str) -> bool:
    """Whether a letter after this text is a part of a name, such as of an apartment."""
    match = re.search(r"(^|\S[ \t]+|\n)\W*([A-Za-z]+)[ \t]+$", before)
    if match is None:
        return False
    inner = match[1].strip() != "" and match[1].strip() not in ".!?:"
    word = match[2]
    capital = word[0].isupper() and word[1:].islower() and not _CHOOSING.fullmatch(word.lower())
    return _NAME.fullmatch(word.lower()) is not None or (inner and capital)


def _joined(text: str, found: list[_Found], one: _Found) -> bool:
    """Whether a letter is named as one of several: "A or B"."""
    for first, second in itertools.pairwise(found):
        if one in (first, second) and first.letter != second.letter:
            between = text[first.end : second.start]
            if re.fullmatch(r"[\s*)\"']*(?:,|/|&|\+|,?\s*and|,?\s*or)\s*(?:also|option|answer)?[\s*(\"']*", between):
                return True
    return False
