"""One row of data, by what it is for. No torch.

Every record has an `id`: the row's own, or its 0-based number.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("sft", "classify", "summarize", "preferences", "prompts")
LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}
ROLES = ("system", "user", "assistant")
# Every field that some kind of row has, and that `columns` may map.
FIELDS = (
    "id", "text", "label", "prompt", "completion", "messages", "document", "summary", "chosen", "rejected", "margin"
)
# Bytes of a line or characters of a text: what reaches it is a file without line ends rather than a text to learn.
LONGEST = 10_000_000
# C0 and DEL without tab, newline and carriage return. C1 stays: thousands of web texts hold a stray one.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Text:
    """A document, for SFT and perplexity."""

    id: str
    text: str


@dataclass(frozen=True)
class LabelledText:
    """A document with its class, counted from 0."""

    id: str
    text: str
    label: int


@dataclass(frozen=True)
class PromptCompletion:
    """What is given, and what is learned; `label` where the row is of a class."""

    id: str
    prompt: str
    completion: str
    label: int | None = None


@dataclass(frozen=True)
class Message:
    """One turn; role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the assistant's."""

    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class SummaryPair:
    """A document and its summary."""

    id: str
    document: str
    summary: str


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to a prompt, one of them better: by `margin`, where that is known; `label`: of the prompt, if any."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    label: int | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt for sampling; `label` where the row has one."""

    id: str
    prompt: str
    label: int | None = None


Record = Text | LabelledText | PromptCompletion | Conversation | SummaryPair | PreferencePair | Prompt


def parse_row(kind: str, row: Any, number: int, labels: Sequence[str] | None = None) -> Record:
    """A record from a row's mapping; `labels` names the classes in order (default: binary, see `LABELS`).

    Raises ValueError with the reason: one line that begins with the field.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with named fields, not {shown(row)}")
    return _PARSERS[kind](row, row_id(row) or str(number), labels)


def row_id(row: Mapping[str, Any]) -> str | None:
    """The row's own id, if it has one. Raises ValueError where it is neither text nor an integer."""
    given = row.get("id")
    if given is None or given == "":
        return None
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise ValueError(f"id: expected text or an integer, not {shown(given)}")
    return _encodable(str(given), "id")


def shown(value: Any) -> str:
    """A value in an error message: on one line, short, nothing that a terminal obeys."""
    try:
        text = repr(value)  # escapes control characters, bidirectional ones too
    except ValueError:  # an integer of more digits than Python prints
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


class Missing(ValueError):
    """A row lacks a field, `told`. `fields` are the row's own that would do; none where a turn in it lacks one."""

    def __init__(self, row: Mapping[str, Any], told: str, fields: tuple[str, ...]) -> None:
        super().__init__(f"{told}: missing; the row has {fields_of(row)}")
        self.told, self.fields = told, fields


def fields_of(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, in an error message."""
    return _listed(map(shown, row)) or "no fields"


def _listed(names: Iterable[str], most: int = 12) -> str:
    first = [*itertools.islice(names, most + 1)]
    return ", ".join(first if len(first) <= most else [*first[:most], "..."])


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: holds half of a surrogate pair, which is no character") from None
    return text


def _text(row: Mapping[str, Any], field: str, where: str = "") -> str:
    if field not in row:
        raise Missing(row, where or field, () if where else (field,))
    where, value = where or field, row[field]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"{where}: {'null' if value is None else 'NaN'}")
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, not {shown(value)}")
    if not value.strip():
        raise ValueError(f"{where}: empty")
    if len(value) >= LONGEST:
        raise ValueError(f"{where}: {len(value):,} characters; expected fewer than {LONGEST:,}")
    if control := _CONTROL.search(value):
        found = f"U+{ord(control[0]):04X} at character {control.start() + 1}"
        raise ValueError(f"{where}: holds the control character {found}")
    return _encodable(value, where)


def known_labels(labels: Sequence[str] | None) -> dict[str, int]:
    """What a row may call its class, in lower case, and the class; `labels` names the classes in order."""
    if not labels:
        return LABELS
    names = {name.lower(): i for i, name in enumerate(labels)}
    # Where a name is a number, as of stars from 1 to 5, numbers are names: counting from 0 would confuse the two.
    return names if any(map(str.isdigit, names)) else {str(i): i for i in range(len(labels))} | names


def _class_of(value: Any, known: Mapping[str, int]) -> int | None:
    """The class that a row's label names; None where it names none."""
    key = value.strip().lower() if isinstance(value, str) else ""
    # NaN, infinity and what is longer than Python prints are no numbers of a class.
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**9 and value == int(value):
        key = str(int(value))
    return known.get(key)


def _label(row: Mapping[str, Any], labels: Sequence[str] | None) -> int:
    if "label" not in row:
        raise Missing(row, "label", ("label",))
    known = known_labels(labels)
    found = _class_of(row["label"], known)
    if found is None:
        raise ValueError(f"label: {shown(row['label'])} is not one of {_listed(known)}")
    return found


def _sft(row: Mapping[str, Any], identity: str, labels: Sequence[str] | None) -> Record:
    if "messages" in row:
        return Conversation(identity, _messages(row["messages"]))
    if "prompt" in row or "completion" in row:
        # Here a label only serves the rubric: a column of that name that means something else is no defect.
        label = _class_of(row.get("label"), known_labels(labels))
        return PromptCompletion(identity, _text(row, "prompt"), _text(row, "completion"), label)
    if "text" not in row:
        fields = ("text", "prompt", "completion", "messages")
        raise Missing(row, "text (or prompt and completion, or messages)", fields)
    return Text(identity, _text(row, "text"))


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise ValueError(f"messages: expected a list of {{role, content}}, not {shown(value)}")
    turns: list[Message] = []
    for index, turn in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(turn, Mapping):
            raise ValueError(f"{where}: expected {{role, content}}, not {shown(turn)}")
        if turn.get("role") not in ROLES:
            raise ValueError(f"{where}.role: {shown(turn.get('role'))} is not one of {', '.join(ROLES)}")
        if turn["role"] == "system" and index:
            raise ValueError(f"{where}.role: a system turn can only be the first")
        before = turns[-1].role if turns and turns[-1].role != "system" else "assistant"
        if turn["role"] == before:
            wanted = "user" if before == "assistant" else "assistant"
            raise ValueError(f"{where}.role: expected {wanted}, not {before}; the user begins, then they take turns")
        turns.append(Message(turn["role"], _text(turn, "content", f"{where}.content")))
    if turns[-1].role != "assistant":
        raise ValueError("messages: the last turn must be the assistant's, which is what is learned")
    return tuple(turns)


def _classify(row: Mapping[str, Any], identity: str, labels: Sequence[str] | None) -> Record:
    return LabelledText(identity, _text(row, "text"), _label(row, labels))


def _summarize(row: Mapping[str, Any], identity: str, _: Sequence[str] | None) -> Record:
    return SummaryPair(identity, _text(row, "document"), _text(row, "summary"))


def _preferences(row: Mapping[str, Any], identity: str, labels: Sequence[str] | None) -> Record:
    prompt, chosen, rejected = (_text(row, field) for field in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise ValueError("rejected: the same as chosen, which prefers nothing")
    return PreferencePair(identity, prompt, chosen, rejected, _label_if_given(row, labels), _margin(row))


def _label_if_given(row: Mapping[str, Any], labels: Sequence[str] | None) -> int | None:
    return None if row.get("label") in (None, "") else _label(row, labels)


def _margin(row: Mapping[str, Any]) -> float | None:
    """By how much chosen is better, if the row says; a CSV's number is text."""
    given = row.get("margin")
    if given in (None, ""):
        return None
    try:
        margin = math.nan if isinstance(given, bool) or not isinstance(given, int | float | str) else float(given)
    except (ValueError, OverflowError):
        margin = math.nan
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin: expected a number of 0 or more, not {shown(given)}")
    return margin


def _prompts(row: Mapping[str, Any], identity: str, labels: Sequence[str] | None) -> Record:
    field = "text" if "text" in row and "prompt" not in row else "prompt"
    return Prompt(identity, _text(row, field), _label_if_given(row, labels))


_PARSERS: dict[str, Callable[[Mapping[str, Any], str, Sequence[str] | None], Record]] = {
    "sft": _sft,
    "classify": _classify,
    "summarize": _summarize,
    "preferences": _preferences,
    "prompts": _prompts,
}
