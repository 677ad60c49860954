"""Records become rows of token ids and labels. Labels are -100 where no loss is taken."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

IGNORED = -100
Row = dict[str, list[int]]


def document_ids(texts: Sequence[str], tokenizer: Any, limit: int = 0) -> list[list[int]]:
    """Token ids of whole documents, each ended by EOS; with `limit`, only the first `limit` tokens of longer ones.

    A cut document gets no EOS: it did not end there.
    """
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ended = [[*row, tokenizer.eos_token_id] for row in rows]
    return [row[:limit] for row in ended] if limit else ended


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
