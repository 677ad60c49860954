"""What a T5 learns from plain text: to fill gaps in it, to repeat it, and to say its principal sentence. No torch.

Span corruption (Raffel et al. 2020, section 3.1.4): spans of a document are hidden, each behind a sentinel, and the
target lists them. Text infilling (Lewis et al. 2020, BART): the target is the whole document. Gap sentences (Zhang et
al. 2020, PEGASUS): the target is the sentence most like the rest. Before all that come copies: a few tokens of a
document in random order, to be repeated. No knowledge of language helps there, so that the decoder learns to look into
the encoder (synthetic tasks first: Wu et al. 2022, arXiv 2206.10139).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .overlap import f_measure, words
from .tokenize import Row, encode, sentences

PREFIX, MASK = "summarize: ", "<mask>"
SENTINELS = [f"<extra_id_{number}>" for number in range(100)]


@dataclass(frozen=True)
class Noise:
    """How a document is corrupted: the share of its tokens that is hidden, in spans of `span` tokens on average.

    `whole`: the target is the document, and what is hidden is one mask a span; else sentinels and the spans themselves.
    """

    share: float
    span: float
    whole: bool = False

    def counts(self, length: int, most: int = len(SENTINELS) - 1) -> tuple[int, int]:
        """How many of `length` >= 2 tokens are hidden, and in how many spans, at most `most`."""
        hidden = min(max(1, round(self.share * length)), length - 1)
        return hidden, min(max(1, round(hidden / self.span)), hidden, length - hidden + 1, most)


SPANS = Noise(0.15, 3)  # Raffel et al. 2020, section 3.3.4
# Much more to say in each step than T5's own: a small model on few texts learns from how many tokens it predicts.
DENSE = Noise(0.5, 8)  # an extreme denoiser of UL2 (Tay et al. 2022), between its two
WHOLE = Noise(0.3, 3, whole=True)  # Lewis et al. 2020, section 2.2
COPIED = 48  # tokens: among few, the one to look at is soon found


def corrupt(
    ids: Sequence[int], draw: random.Random, sentinels: Sequence[int], eos: int, noise: Noise = SPANS
) -> tuple[list[int], list[int]]:
    """(input, target), both ended by `eos`: in the input each hidden span is one sentinel, in order; in the target
    each sentinel is followed by its span, and one more sentinel ends the last.

    Span lengths are a uniform random partition, like the original's. Either end of the document may be hidden (the
    original always keeps the first token and hides the last). Raises ValueError for fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError("a document of fewer than two tokens has nothing to keep beside what is hidden")
    count, spans = noise.counts(len(ids), len(sentinels) - 1)
    hidden = _partition(count, spans, draw)
    # Two more than are kept, shared out in parts of at least one and taken back at both ends: those may be empty.
    kept = _partition(len(ids) - count + 2, spans + 1, draw)
    kept[0], kept[-1] = kept[0] - 1, kept[-1] - 1
    shown, target, at = list(ids[: kept[0]]), [], kept[0]
    for sentinel, gap, run in zip(sentinels, hidden, kept[1:], strict=False):
        shown += [sentinel, *ids[at + gap : at + gap + run]]
        target += [sentinel, *ids[at : at + gap]]
        at += gap + run
    return [*shown, eos], [*target, sentinels[spans], eos]


def _partition(total: int, parts: int, draw: random.Random) -> list[int]:
    """`total` as a sum of `parts` positive integers, each such sum equally likely."""
    cuts = [0, *sorted(draw.sample(range(1, total), parts - 1)), total]
    return [end - start for start, end in itertools.pairwise(cuts)]


def principal(parts: Sequence[str]) -> int | None:
    """The number of the sentence with the highest ROUGE-1 F against all others together; of equals the first.

    None where there are not two sentences with words.
    """
    counted = [Counter(words(part)) for part in parts]
    whole = Counter(itertools.chain.from_iterable(map(Counter.elements, counted)))
    total = whole.total()
    if sum(map(bool, counted)) < 2:
        return None
    scores = [
        f_measure(sum(min(n, whole[word] - n) for word, n in own.items()), own.total(), total - own.total())
        for own in counted
    ]
    return scores.index(max(scores))


def principal_sentence(text: str) -> str | None:
    """The sentence of a text that is most like the rest of it (see `principal`); the same text gives the same one."""
    parts = sentences(text)
    number = principal(parts)
    return None if number is None else parts[number]


def blocks(texts: Sequence[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Documents cut so that a block, corrupted, takes `length` tokens at most; a rest of one token is dropped."""
    size = length - 1  # a sentinel is never longer than its span; EOS comes behind
    documents = encode(texts, tokenizer)
    return [ids[at : at + size] for ids in documents for at in range(0, len(ids), size) if len(ids) - at > 1]


@dataclass(frozen=True)
class Gap:
    """A document around its principal sentence, in token ids. `before` begins with the task's prefix."""

    before: list[int]
    sentence: list[int]
    after: list[int]
    target: list[int]

    def row(self, mask: int | None) -> Row:
        """The sentence from the document: replaced by the token `mask`, or, with None, there to be found."""
        ids = [*self.before, *(self.sentence if mask is None else [mask]), *self.after]
        return {"input_ids": ids, "labels": self.target}


def gaps(texts: Sequence[str], tokenizer: Any, length: int) -> list[Gap]:
    """Each document's first sentences that take `length` tokens with prefix and EOS, around the principal one of them.

    Documents of one sentence have none. One whose principal sentence takes more than a quarter of `length` is left
    out too: that is no summary, and one long target pads a whole batch.
    """
    end: int = tokenizer.eos_token_id
    prefix = encode([PREFIX.rstrip()], tokenizer)[0]
    documents = [sentences(text) for text in texts]
    # White space stands before a word in byte-level BPE: sentences spelled alone make the tokens of the whole text.
    spelled = iter(encode([f" {part}" for parts in documents for part in parts], tokenizer))
    found = []
    for parts in documents:
        ids = [next(spelled) for _ in parts]
        sizes = itertools.accumulate(map(len, ids), initial=len(prefix) + 1)
        fit = sum(size <= length for size in sizes) - 1
        number = principal(parts[: max(0, fit)])
        if number is None:
            continue
        target = [*encode([parts[number]], tokenizer)[0], end]
        if len(target) <= length // 4:
            before, after = itertools.chain(*ids[:number]), itertools.chain(*ids[number + 1 : fit])
            found.append(Gap([*prefix, *before], ids[number], [*after, end], target))
    return found


class Views(Sequence[Row]):
    """`views` passes over blocks and gaps, each corrupted anew, one behind the other; the first `copies` are copies.

    Row i is pass i // N and item i % N of N items: a function of (seed, i) alone, made when it is asked for, so that
    memory holds the documents once, however many the passes, and a resumed run sees the same rows. A block meets the
    kinds of `noise` in turn; a gap's sentence is masked in every other pass and left in place in the rest.
    """

    def __init__(
        self,
        blocks: Sequence[list[int]],
        gaps: Sequence[Gap],
        tokenizer: Any,
        seed: int,
        views: int,
        noise: Sequence[Noise] = (SPANS, DENSE, WHOLE),
        copies: int = 0,
    ) -> None:
        self.blocks, self.gaps, self.seed, self.views, self.noise = blocks, gaps, seed, views, noise
        self.copies = copies
        self.items = len(blocks) + len(gaps)
        self.eos: int = tokenizer.eos_token_id
        self.mask: int = tokenizer.mask_token_id
        self.sentinels: list[int] = tokenizer.convert_tokens_to_ids(SENTINELS)

    def __len__(self) -> int:
        return self.views * self.items

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        view, item = divmod(index, self.items)
        draw = random.Random(f"{self.seed} {index}")
        if view < self.copies:
            known = self.blocks[item] if item < len(self.blocks) else self._gap(item).row(None)["input_ids"][:-1]
            ids = [*draw.sample(known, min(COPIED, len(known))), self.eos]
            return {"input_ids": ids, "labels": ids}
        if item >= len(self.blocks):
            return self._gap(item).row(self.mask if (view + item) % 2 else None)
        ids, noise = self.blocks[item], self.noise[(view + item) % len(self.noise)]
        marks = [self.mask] * len(self.sentinels) if noise.whole else self.sentinels
        shown, target = corrupt(ids, draw, marks, self.eos, noise)
        return {"input_ids": shown, "labels": [*ids, self.eos] if noise.whole else target}

    def _gap(self, item: int) -> Gap:
        return self.gaps[item - len(self.blocks)]

    def lengths(self) -> list[int]:
        """Tokens of each item as it is, EOS counted; the inputs of its rows are no longer."""
        return [len(ids) + 1 for ids in self.blocks] + [len(gap.row(None)["input_ids"]) for gap in self.gaps]
