"""Decoding by CUDA graphs: a captured step is the model, the choice of a token, its log-probability and the counters.

A graph is bound to fixed addresses. So rows and slots are rounded up to buckets, all state lives in a `Slab` that is
allocated once a bucket, and weights are read where they lie: what is written into them in place (Roles.refresh) acts in
the next step. The host waits for the device only where it looks whether all rows have ended.

Shapes: B rows, R >= B rows of the bucket, S slots of the cache, P of them the prompt's, L layers, G heads of keys and
values, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..models.captured import CAPTURED_TOKENS
from ..ops.graphs import aside, capturing
from ..ops.masks import UNSEEN
from .between import Rotary, rotated
from .choice import BLOCK, Decoding, choose_in_blocks, row_uniforms
from .fused import FusedStep
from .slab import Slab, row_bucket, slot_bucket

# Kinds of steps that are remembered. Beyond them all are forgotten: a graph holds some megabytes of the device.
KINDS = 64
# (rows, slots) of the slab; slots that are seen (negative: of prompts to be read); temperature, top_k and top_p;
# whether states are kept.
Kind = tuple[tuple[int, ...], int, tuple[float, int, float], bool]


class GraphedDecoder:
    """Decodes by captured steps, or (`capture = False`, and always on a CPU) by the same steps called one by one."""

    def __init__(self, step: FusedStep, capture: bool = True) -> None:
        self.step = step
        self.device = step.head.device
        self.capture = capture and self.device.type == "cuda"
        self.stream: Any = torch.cuda.Stream(self.device) if self.capture else None
        self.graphs: dict[Kind, torch.cuda.CUDAGraph | None] = {}
        self.slabs: dict[tuple[int, int], Slab] = {}
        self.kept: dict[tuple[int, int], Tensor] = {}  # by (rows, slots), the states of each step
        self.last: tuple[int, Tensor] | None = None  # of the last decode: its turn, and what it kept
        self.cache = step.head.new_empty(0)
        self.logits = step.head.new_empty(0)
        self.turn = 0

    def decode(
        self,
        ids: Tensor,
        mask: Tensor,
        seeds: Sequence[int],
        eos_id: int | None,
        decoding: Decoding,
        look_every: int = 1,
        keep: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tokens, logprobs), each (B,), a step, until max_new_tokens or all rows are seen to have ended.

        ids, mask (B, P), left-padded; a seed a row. It looks every `look_every` steps, so up to that many less one come
        after the last EOS. What is yielded stays as it is until the next decode begins. `keep`: for `states`.
        """
        self.turn += 1
        self.step.refresh()
        turn, rows, steps = self.turn, len(ids), decoding.max_new_tokens
        prompt = -(-ids.shape[1] // 8) * 8  # attention asks for rows of a mask that are aligned
        slab = self._slab(rows, prompt + steps)
        slab.begin(ids, mask, prompt, row_uniforms(seeds, steps), -1 if eos_id is None else eos_id)
        size, choice = slab.unseen.shape, (decoding.temperature, decoding.top_k, decoding.top_p)
        layer = slab.cache[0]  # all are alike
        kept = self._kept(slab) if keep else None
        self.last = None if kept is None else (turn, kept)
        for step in range(steps):
            if turn != self.turn:
                raise RuntimeError("another decode began before this one had ended: they share one cache")
            if step == 0:
                self._run((size, -prompt, choice, keep), partial(self._read, slab, prompt, decoding, kept))
            else:
                seen = self.step.between.seen(self.step.heads, layer, slot_bucket(prompt + step))
                self._run((size, seen, choice, keep), partial(self._advance, slab, seen, decoding, kept))
            yield slab.chosen[step, :rows], slab.logprobs[step, :rows]
            if eos_id is not None and (step + 1) % look_every == 0 and bool(slab.ended.all()):
                return

    def states(self, turn: int, steps: int, rows: int) -> Tensor:
        """What the first tokens of each row were chosen from in the decode of a `turn`, which kept it: (steps, rows,
        width) in float32. RuntimeError where another has begun since."""
        if self.last is None or self.last[0] != turn:
            raise RuntimeError("another decode began since: what this one kept is no longer there")
        return self.step.states(self.last[1][:steps, :rows])

    def _kept(self, slab: Slab) -> Tensor:
        """A place for the states of each step."""
        rows, slots = slab.unseen.shape
        if (rows, slots) not in self.kept:
            self.kept[rows, slots] = self.step.rows_of_states(slots, rows)
        return self.kept[rows, slots]

    def _read(self, slab: Slab, prompt: int, decoding: Decoding, kept: Tensor | None) -> None:
        """Read the prompts and choose a first token."""
        rows, groups, width = len(slab.tokens), self.step.groups, self.step.width
        hidden = slab.unseen[:, None, None, :prompt]
        hidden = torch.minimum(hidden, hidden.new_full((prompt, prompt), UNSEEN).triu(1))

        def attend(layer: int, made: Tensor, rotary: Rotary) -> Tensor:
            query, pairs = rotated(made, groups, rotary)
            cache = slab.cache[layer, :, :, :, :prompt]
            cache.copy_(pairs.view(rows, prompt, 2, groups, width).permute(2, 0, 3, 1, 4))
            query = query.reshape(rows, prompt, groups, -1, width).permute(0, 2, 3, 1, 4)
            keys, values = (part.unsqueeze(2).expand(query.shape).flatten(1, 2) for part in cache)
            query = query.flatten(1, 2)
            seen = hidden.expand(-1, query.shape[1], -1, -1)
            mixed = scaled_dot_product_attention(query, keys, values, attn_mask=seen)
            return self.step.between.rows(mixed.transpose(1, 2).reshape(rows * prompt, -1))

        states = self.step(slab.ids[:, :prompt].flatten(), slab.places[:, :prompt].flatten(), attend)
        self._choose(slab, states.view(rows, prompt, -1)[:, -1], decoding, kept)

    def _advance(self, slab: Slab, seen: int, decoding: Decoding, kept: Tensor | None) -> None:
        """Read the last tokens, over the first `seen` slots, and choose the next."""
        slab.unseen.index_fill_(1, slab.slot, 0.0)

        def attend(layer: int, made: Tensor, rotary: Rotary) -> Tensor:
            return self.step.between.attend(made, rotary, slab.cache[layer], slab.unseen, slab.slot, seen)

        self._choose(slab, self.step(slab.tokens, slab.positions, attend), decoding, kept)

    def _choose(self, slab: Slab, states: Tensor, decoding: Decoding, kept: Tensor | None) -> None:
        """Choose tokens by the last states (R, K), and move on. Nothing in it asks the device for a value."""
        if kept is not None:
            kept.index_copy_(0, slab.step, states[:, : kept.shape[2]].unsqueeze(0))
        self.step.logits(states, slab.logits)
        uniforms = slab.uniforms.index_select(0, slab.step)[0]
        tokens, logprobs = choose_in_blocks(slab.logits, uniforms, decoding)
        slab.chosen.index_copy_(0, slab.step, tokens.unsqueeze(0))
        slab.logprobs.index_copy_(0, slab.step, logprobs.unsqueeze(0))
        slab.ended.logical_or_(tokens == slab.eos)
        slab.tokens.copy_(tokens)
        slab.counters.add_(1)

    def _run(self, kind: Kind, body: Callable[[], None]) -> None:
        """A step of a kind: called the first time, when libraries set up what they keep, then captured, then replayed.

        What is captured leaves nothing but what it wrote into its slab, so all graphs share one pool of memory.
        """
        (rows, _), seen, *_ = kind
        if not self.capture or -seen * rows > CAPTURED_TOKENS:
            body()
            self.graphs.setdefault(kind, None)
            return
        with torch.cuda.device(self.device):
            if kind not in self.graphs:
                with aside(self.stream):
                    body()
                self.graphs[kind] = None
                return
            graph = self.graphs[kind]
            if graph is None:
                # The allocator forgets a pool with its last graph, so the handle comes from one that lives.
                pool = next((other.pool() for other in self.graphs.values() if other), None)
                with capturing(self.stream, pool) as graph:
                    body()
                self.graphs[kind] = graph
            graph.replay()

    def _slab(self, rows: int, slots: int) -> Slab:
        """The slab of a bucket. All of them share one memory for cache and logits: one decode runs at a time."""
        rows, slots = row_bucket(rows), slot_bucket(slots)
        shape = (self.step.layers, 2, rows, self.step.groups, slots, self.step.width)
        size = prod(shape)
        if size > len(self.cache) or rows > len(self.logits) or len(self.graphs) >= KINDS:
            self._forget(max(size, len(self.cache)), max(rows, len(self.logits)))
        if (rows, slots) not in self.slabs:
            self.slabs[rows, slots] = Slab.around(self.cache[:size].view(shape), self.logits[:rows])
        return self.slabs[rows, slots]

    def _forget(self, size: int, rows: int) -> None:
        """Drop all graphs and slabs, and make room for caches of `size` numbers and logits of `rows`."""
        if self.capture:
            torch.cuda.synchronize(self.device)  # the last decode may have been left while its graph ran
        self.graphs.clear()
        self.slabs.clear()
        self.kept.clear()
        self.last = None
        self.cache = self.logits = self.cache.new_empty(0)  # the old is free before the new is asked for
        self.cache = self.cache.new_empty(size)
        vocabulary = -(-len(self.step.head) // BLOCK) * BLOCK
        self.logits = self.cache.new_full((rows, vocabulary), -torch.inf)
