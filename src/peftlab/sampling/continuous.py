"""Continuous batching: rows join a running batch, and leave it, between two tokens.

Each row brings its own seed, decoding and adapters, and draws from its own uniforms, so what it says does not depend
on who shares its batch. A round is `join`, `choose`, `leave`, `advance`.

Shapes: B rows, P prompt tokens, V vocabulary; L layers, R >= B rows and S slots of the cache, G heads of keys and
values, D width of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..models.per_row import Blend, PerRow
from ..ops.masks import position_ids
from .choice import Decoding, choose, row_uniforms
from .engine import PlainDecoder, Step, known_step
from .sampler import Sampler

CACHE_TOKENS = 32_768  # rows times the longest that one of them may become: bounds the memory of keys and values
PREFILL_TOKENS = 4_096  # of prompts that join at once, padding included: the others wait meanwhile


@dataclass(eq=False)
class Row:
    """A prompt to go on from. `top`: how many of the likeliest tokens to tell beside the one chosen; None: none, and no
    log-probabilities either."""

    ids: Sequence[int]
    seed: int
    decoding: Decoding
    blend: Blend = ()
    top: int | None = None
    taken: int = field(default=0, init=False)  # tokens chosen so far
    uniforms: list[float] = field(default_factory=list, init=False)

    @property
    def longest(self) -> int:
        """Tokens of prompt and completion, at most."""
        return max(1, len(self.ids)) + self.decoding.max_new_tokens


@dataclass(frozen=True)
class Chosen:
    """A row's next token. `logprob` and `top`, the likeliest tokens first, are the model's own, at temperature 1 and
    untruncated, whatever the decoding; None and empty where the row did not ask."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Batch:
    """The rows that run on one base. `max_rows`: how many at most. Not safe for threads: one of them owns it."""

    def __init__(self, base: PerRow, sampler: Sampler, max_rows: int = 32) -> None:
        self.base, self.sampler, self.max_rows = base, sampler, max_rows
        self.rows: list[Row] = []
        step = known_step(base.model)
        self._cache: Slots | Together = Slots(base.model, step) if step else Together(base.model)
        self._logits: list[Tensor] = []  # of the next token: (B', V) of those that advanced, then of those that joined
        self._tokens: list[int] = []  # chosen last, in the order of `rows`

    def room(self, waiting: Sequence[Row]) -> int:
        """How many of `waiting`, from the first on, may join now. A row that is alone always may."""
        if self.rows and isinstance(self._cache, Together):
            return 0
        longest, prompt = max((row.longest for row in self.rows), default=0), 0
        for count, row in enumerate(waiting):
            rows = len(self.rows) + count + 1
            longest, prompt = max(longest, row.longest), max(prompt, len(row.ids))
            full = rows > self.max_rows or rows * longest > CACHE_TOKENS
            if (rows > 1 and full) or (count and (count + 1) * prompt > PREFILL_TOKENS):
                return count
        return len(waiting)

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows; they choose with the others. Equal prompts of one model are read once."""
        prompts = list(dict.fromkeys((tuple(row.ids), row.blend) for row in rows))
        ids, mask = self.sampler.pad([prompt for prompt, _ in prompts])
        with self.base.rows([blend for _, blend in prompts]):
            logits = self._cache.join(ids, mask, [prompts.index((tuple(row.ids), row.blend)) for row in rows])
        for row in rows:
            row.uniforms = row_uniforms([row.seed], row.decoding.max_new_tokens)[0].tolist()
        self.rows += rows
        self._logits.append(logits)

    def choose(self) -> list[Chosen]:
        """The next token of every row, in the order of `rows`."""
        logits = torch.cat(self._logits)
        self._logits.clear()
        groups: dict[Decoding, list[int]] = {}
        for index, row in enumerate(self.rows):
            groups.setdefault(replace(row.decoding, max_new_tokens=0), []).append(index)
        self._tokens = [0] * len(self.rows)
        for decoding, members in groups.items():
            uniforms = torch.tensor([self.rows[i].uniforms[self.rows[i].taken] for i in members], device=logits.device)
            tokens, _ = choose(logits if len(groups) == 1 else logits[members], uniforms, decoding)
            for index, token in zip(members, tokens.tolist(), strict=True):
                self._tokens[index] = token
        for row in self.rows:
            row.taken += 1
        return self._told(logits)

    def leave(self, gone: Collection[Row]) -> None:
        """Take rows out, after they chose; the place of each goes to the last one."""
        for index in reversed(range(len(self.rows))):
            if self.rows[index] in gone:
                self._cache.leave(index)
                row, token = self.rows.pop(), self._tokens.pop()
                if index < len(self.rows):
                    self.rows[index], self._tokens[index] = row, token

    @torch.no_grad()
    def advance(self) -> None:
        """Read the tokens chosen last, one a row."""
        if self.rows:
            tokens = torch.tensor(self._tokens, device=self.sampler.device)
            with self.base.rows([row.blend for row in self.rows]):
                self._logits = [self._cache.next(tokens)]

    def clear(self) -> None:
        """Forget every row, in whatever state a failure left them."""
        fresh = Batch(self.base, self.sampler, self.max_rows)
        self.__dict__.update(fresh.__dict__)

    def _told(self, logits: Tensor) -> list[Chosen]:
        """The tokens with what their rows ask to know of them."""
        told = [Chosen(token) for token in self._tokens]
        asked = [index for index, row in enumerate(self.rows) if row.top is not None]
        if not asked:
            return told
        logprobs = logits[asked].float().log_softmax(-1)
        most = max(self.rows[index].top or 0 for index in asked)
        values, tokens = (part.tolist() for part in logprobs.topk(most))
        for place, index in enumerate(asked):
            top = zip(tokens[place], values[place], strict=True)
            wanted = tuple(top)[: self.rows[index].top]
            told[index] = Chosen(told[index].token, float(logprobs[place, told[index].token]), wanted)
        return told


class Slots:
    """Keys and values of rows of different lengths: those of row b lie in its slots from 0 on."""

    def __init__(self, model: Any, step: Step) -> None:
        self.model, self.step = model, step
        self.lengths: list[int] = []
        self.keys = self.values = torch.empty(0)  # (L, R, G, S, D)

    def join(self, ids: Tensor, mask: Tensor, sources: Sequence[int]) -> Tensor:
        """Read prompts (N, P), left-padded, for new rows that go on from prompts `sources`; logits (new rows, V)."""
        output = self.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=True, logits_to_keep=1
        )
        layers, counts = output.past_key_values.layers, mask.sum(1).tolist()
        self._make_room(len(self.lengths) + len(sources), max(counts) + 1, len(layers), layers[0].keys)
        for source in sources:
            row, count = len(self.lengths), counts[source]
            for place, layer in enumerate(layers):
                self.keys[place, row, :, :count] = layer.keys[source, :, -count:]
                self.values[place, row, :, :count] = layer.values[source, :, -count:]
            self.lengths.append(count)
        logits: Tensor = output.logits[list(sources), -1]
        return logits

    def leave(self, row: int) -> None:
        """The last row takes the place of `row`; with the last one the memory is free."""
        last = len(self.lengths) - 1
        if row != last:
            count = self.lengths[row] = self.lengths[last]
            for part in (self.keys, self.values):
                part[:, row, :, :count] = part[:, last, :, :count]
        self.lengths.pop()
        if not self.lengths:
            self.keys = self.values = self.keys.new_empty(0)

    def next(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) behind `tokens` (B,)."""
        end = max(self.lengths) + 1
        self._make_room(len(self.lengths), end, len(self.keys), self.keys)
        places = torch.tensor(self.lengths, device=tokens.device)
        rows, slots = torch.arange(len(places), device=places.device), torch.arange(end, device=places.device)
        seen = (slots <= places[:, None])[:, None, None]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self.keys[layer, : len(query)], self.values[layer, : len(query)]
            keys[rows, :, places], values[rows, :, places] = key, value
            # Heads that share a key stand where positions would: no key is copied for each of them.
            grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1])
            mixed = scaled_dot_product_attention(grouped, keys[:, :, :end], values[:, :, :end], attn_mask=seen)
            return mixed.reshape(len(query), -1)

        logits = self.step(tokens, places, attend)
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def _make_room(self, rows: int, slots: int, layers: int, like: Tensor) -> None:
        """Grow the cache where it is smaller. `like`: keys (..., G, S, D) of its type and device."""
        had = self.keys.shape[1:4:2] if self.keys.numel() else (0, 0)
        if rows <= had[0] and slots <= had[1]:
            return
        rows = max(had[0], 1 << (rows - 1).bit_length())
        slots = max(had[1], -(-slots * 5 // 4 // 64) * 64)
        shape = (layers, rows, like.shape[-3], slots, like.shape[-1])
        # Zeros: a slot that is not seen counts with weight 0, and 0 times what memory holds may be NaN.
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        if self.keys.numel():
            keys[:, : had[0], :, : had[1]] = self.keys
            values[:, : had[0], :, : had[1]] = self.values
        self.keys, self.values = keys, values


class Together:
    """Rows of an architecture whose step we do not know: they begin together, and others wait until all have left."""

    def __init__(self, model: Any) -> None:
        self._decoder = PlainDecoder(model)
        self._count = 0  # of the rows

    def join(self, ids: Tensor, mask: Tensor, sources: Sequence[int]) -> Tensor:
        """As in `Slots`, of a batch that is empty."""
        self._count = len(sources)
        rows = torch.tensor(sources, device=ids.device)
        logits = self._decoder.first(ids, mask)[rows]
        self._decoder.keep(rows)
        return logits

    def leave(self, row: int) -> None:
        """The last row takes the place of `row`."""
        self._count -= 1
        if self._count:
            rows = torch.arange(self._count, device=self._decoder.mask.device)
            if row < self._count:
                rows[row] = self._count
            self._decoder.keep(rows)

    def next(self, tokens: Tensor) -> Tensor:
        """As in `Slots`."""
        return self._decoder.next(tokens)
