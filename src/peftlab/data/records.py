"""One row of data, by what it is for. No torch. Every record has an `id`: the row's own, or its 0-based number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("sft", "classify", "summarize", "preferences", "prompts")
LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}


@dataclass(frozen=True)
class Text:
    id: str
    text: str


@dataclass(frozen=True)
class LabelledText:
    id: str
    text: str
    label: int


@dataclass(frozen=True)
class PromptCompletion:
    id: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Message:
    """One turn; role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class SummaryPair:
    id: str
    document: str
    summary: str


@dataclass(frozen=True)
class PreferencePair:
    id: str
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Prompt:
    """A prompt for sampling; `label` where the row has one."""

    id: str
    prompt: str
    label: int | None = None


Record = Text | LabelledText | PromptCompletion | Conversation | SummaryPair | PreferencePair | Prompt


def parse_row(kind: str, row: Any, number: int, labels: Sequence[str] | None = None) -> Record:
    """A record from a row's mapping. Raises ValueError with the reason, in the row's own words."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with named fields, not {type(row).__name__}")
    return _PARSERS[kind](row, _identity(row, number), labels)


def _identity(row: Mapping[str, Any], number: int) -> str:
    given = row.get("id")
    if given is None:
        return str(number)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise ValueError(f"id: expected a string or an integer, not {given!r}")
    return str(given)


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise ValueError(f"{field}: missing; the row has {', '.join(map(str, row)) or 'no fields'}")
    value = row[field]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"{field}: null")
    if not isinstance(value, str):
        raise ValueError(f"{field}: expected text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{field}: empty")
    odd = next((c for c in value if (ord(c) < 32 and c not in "\n\r\t") or ord(c) == 127), None)
    if odd is not None:
        raise ValueError(f"{field}: holds the control character U+{ord(odd):04X}")
    return value


def _label(row: Mapping[str, Any], labels: Sequence[str] | None) -> int:
    if "label" not in row:
        raise ValueError(f"label: missing; the row has {', '.join(map(str, row)) or 'no fields'}")
    value = row["label"]
    known = {str(name).lower(): index for index, name in enumerate(labels)} if labels else LABELS
    known |= {str(index): index for index in range(len(labels or ()))}
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
    if value is None or isinstance(value, bool) or text not in known:
        raise ValueError(f"label: {value!r} is not one of {', '.join(known)}")
    return known[text]


def _sft(row: Mapping[str, Any], identity: str, _: Sequence[str] | None) -> Record:
    if "messages" in row:
        return Conversation(identity, _messages(row["messages"]))
    if "prompt" in row or "completion" in row:
        return PromptCompletion(identity, _text(row, "prompt"), _text(row, "completion"))
    return Text(identity, _text(row, "text"))


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError("messages: expected a list of {role, content}")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping) or turn.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"messages[{index}]: role must be system, user or assistant")
        turns.append(Message(turn["role"], _text(turn, "content")))
    if turns[-1].role != "assistant":
        raise ValueError("messages: the last turn must be the assistant's, which is what is learned")
    return tuple(turns)


def _prompt(row: Mapping[str, Any], identity: str, labels: Sequence[str] | None) -> Record:
    field = "prompt" if "prompt" in row else "text"
    return Prompt(identity, _text(row, field), _label(row, labels) if "label" in row else None)


_PARSERS: dict[str, Callable[[Mapping[str, Any], str, Sequence[str] | None], Record]] = {
    "sft": _sft,
    "classify": lambda row, identity, labels: LabelledText(identity, _text(row, "text"), _label(row, labels)),
    "summarize": lambda row, identity, _: SummaryPair(identity, _text(row, "document"), _text(row, "summary")),
    "preferences": lambda row, identity, _: PreferencePair(
        identity, _text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected")
    ),
    "prompts": _prompt,
}
