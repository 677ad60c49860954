"""Records become rows of token ids and labels. Labels are -100 where no loss is taken."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

IGNORED = -100
# A full stop, or its like, before white space; quotes and brackets may close behind it.
SENTENCE_END = re.compile(r"""[.!?]["')\]]*(?=\s)""")
Row = dict[str, list[int]]
# The chat template of models that bring none, GPT-2's class: roles and turns in plain words.
PLAIN_CHAT = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% else %}{{ message.role | capitalize }}:\n{{ message.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def sentences(text: str) -> list[str]:
    """A text cut behind each SENTENCE_END, white space around the parts removed; what ends without one is the last."""
    cuts = [0, *(found.end() for found in SENTENCE_END.finditer(text)), len(text)]
    parts = (text[start:end].strip() for start, end in itertools.pairwise(cuts))
    return [part for part in parts if part]


def document_ids(texts: Sequence[str], tokenizer: Any, limit: int = 0) -> list[list[int]]:
    """Token ids of whole documents, each ended by EOS.

    With `limit`, a longer document keeps the whole sentences that fit into `limit` tokens with the EOS; where not
    even one fits, it is cut and gets no EOS, since nothing ends there.
    """
    end: int = tokenizer.eos_token_id
    if not limit:
        return [[*row, end] for row in encode(texts, tokenizer)]
    rows = []
    for text, row in zip(texts, encode([t[: 12 * limit] for t in texts], tokenizer), strict=True):
        if len(row) < limit and len(text) <= 12 * limit:
            rows.append([*row, end])
            continue
        fits = len(tokenizer.decode(row[: limit - 1], clean_up_tokenization_spaces=False))
        # One character more: the white space behind a sentence that fills the limit exactly.
        ends = [m.end() for m in SENTENCE_END.finditer(text, 0, fits + 1) if m.end() <= fits]
        rows.append([*encode([text[: ends[-1]]], tokenizer)[0][: limit - 1], end] if ends else row[:limit])
    return rows


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, without special tokens, uncut."""
    if not texts:  # the tokenizer fails on an empty batch
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def pack(documents: Iterable[Sequence[int]], length: int) -> list[Row]:
    """Fill blocks of at most `length` tokens with documents, each whole, by best fit (longest first).

    Positions restart at each document and the first label of each is ignored, so that (with no attention mask) a
    document neither sees nor is predicted from its neighbours. A document longer than a block is cut into blocks, each
    of which begins anew.
    """
    pieces = [list(d[i : i + length]) for d in documents for i in range(0, len(d), length)]
    pieces.sort(key=len, reverse=True)
    blocks: list[list[list[int]]] = []
    room: list[tuple[int, int]] = []  # (free tokens, block number), ascending
    for piece in pieces:
        at = bisect.bisect_left(room, (len(piece), 0))
        if at == len(room):
            blocks.append([])
            free, number = length, len(blocks) - 1
        else:
            free, number = room.pop(at)
        blocks[number].append(piece)
        if free > len(piece):
            bisect.insort(room, (free - len(piece), number))
    return [_block(parts) for parts in blocks]


def labelled(rows: Sequence[Row]) -> list[Row]:
    """Those that have a label: a block of last tokens, which cuts left alone, has none and nothing to learn from."""
    return [row for row in rows if any(label != IGNORED for label in row["labels"])]


def _block(parts: Sequence[Sequence[int]]) -> Row:
    return {
        "input_ids": [token for part in parts for token in part],
        "position_ids": [position for part in parts for position in range(len(part))],
        "labels": [label for part in parts for label in (IGNORED, *part[1:])],
    }


def prompt_completion(prompt: str, completion: str, tokenizer: Any, length: int) -> Row:
    """Loss on the completion and its EOS only. Where both do not fit, the prompt loses its oldest tokens."""
    answer = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:length]
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    asked = asked[max(0, len(asked) + len(answer) - length) :]
    ids = asked + answer
    labels = [IGNORED] * len(asked) + answer
    labels[0] = IGNORED
    return {"input_ids": ids, "position_ids": list(range(len(ids))), "labels": labels}
