"""Conversations as files: one row of `messages`, which `peftlab sft` trains on and `data check --for sft` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.check import scan_file
from ..data.records import Conversation, Message
from ..errors import LabError, UserError
from ..runs.atomic import write_rows
from ..runs.sanitize import sanitize

ENDING = ".jsonl"


def save(path: Path, system: str, turns: Sequence[Message]) -> int:
    """Write the conversation, the whole of it; how many exchanges were left out since their reply is empty.

    What is written is what was seen: `data check` refuses control characters, which a model may say. Raises UserError
    where nothing is left, or the file cannot be written.
    """
    if path.suffix != ENDING:
        raise UserError(f"/save {path}: give a name that ends in {ENDING}")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    texts = [(sanitize(asked.content), sanitize(said.content)) for asked, said in pairs]
    whole = [(asked, said) for asked, said in texts if asked.strip() and said.strip()]
    if not whole:
        raise UserError("/save: no reply yet")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
    for asked, said in whole:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    try:
        write_rows(path, [{"messages": messages}])
    except LabError as error:
        raise UserError(str(error)) from None
    return len(texts) - len(whole)


def load(path: Path) -> tuple[str, list[Message], int]:
    """System text and turns of the first conversation in a file, and how many rows there are.

    Raises UserError naming the line that is none.
    """
    if path.suffix != ENDING or not path.is_file():
        raise UserError(f"/load {path}: no such file, or no name that ends in {ENDING}")
    rows = list(scan_file(path, "sft"))
    if not rows:
        raise UserError(f"/load {path}: holds no conversation")
    line, first = rows[0]
    if not isinstance(first, Conversation):
        told = first if isinstance(first, str) else "no `messages` in it"
        raise UserError(f"{path}:{line}: {told}")
    head, *rest = first.messages
    system, turns = (head.content, rest) if head.role == "system" else ("", list(first.messages))
    if not turns or turns[0].role != "user":
        raise UserError(f"{path}:{line}: a chat begins with the user's turn")
    return system, turns, len(rows)
