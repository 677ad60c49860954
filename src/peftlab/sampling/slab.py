"""The state of one decode, at addresses that stay: what captured steps read and write.

Shapes: R rows and S slots of a bucket, B <= R rows in use, P slots of the prompts, V vocabulary, L layers, G heads of
keys and values, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.masks import UNSEEN, position_ids


def row_bucket(rows: int) -> int:
    """Rows of the slab that serves `rows`: a power of two up to 64, then a multiple of 64."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64


def slot_bucket(slots: int) -> int:
    """Slots that a step over `slots` reads: multiples of 32, further apart in long texts (a quarter at most)."""
    step = max(32, 1 << max(0, slots.bit_length() - 3))
    return -(-slots // step) * step


@dataclass(frozen=True)
class Slab:
    """State of a decode of R rows and S slots. Outputs have a place for each step, at most S of them.

    cache      (L, 2, R, G, S, D) keys and values
    logits     (R, V')            V rounded up to blocks of the choice, the excess -inf
    ids, places (R, S)            of the prompts: tokens, and where they stand in their text
    unseen     (R, S)             0 where a slot may be seen, UNSEEN where not
    tokens     (R,)               to read next
    counters   (R + 2,)           of which `positions` (R,): where tokens stand in their text; `slot` (1,): where their
                                  keys go; `step` (1,): the number of tokens chosen so far
    ended      (R,)               True from a row's EOS on
    eos        (1,)               -1 without one
    uniforms   (S, R)             a draw for each step
    chosen, logprobs (S, R)       the outputs
    """

    cache: Tensor
    logits: Tensor
    ids: Tensor
    places: Tensor
    unseen: Tensor
    tokens: Tensor
    counters: Tensor
    ended: Tensor
    eos: Tensor
    uniforms: Tensor
    chosen: Tensor
    logprobs: Tensor

    @classmethod
    def around(cls, cache: Tensor, logits: Tensor) -> Slab:
        """A slab of the size that its two large parts have."""
        rows, slots = cache.shape[2], cache.shape[4]

        def new(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=cache.device)

        return cls(
            cache=cache,
            logits=logits,
            ids=new(rows, slots),
            places=new(rows, slots),
            unseen=new(rows, slots, dtype=cache.dtype),
            tokens=new(rows),
            counters=new(rows + 2),
            ended=new(rows, dtype=torch.bool),
            eos=new(1),
            uniforms=new(slots, rows, dtype=torch.float32),
            chosen=new(slots, rows),
            logprobs=new(slots, rows, dtype=torch.float32),
        )

    @property
    def positions(self) -> Tensor:
        return self.counters[:-2]

    @property
    def slot(self) -> Tensor:
        return self.counters[-2:-1]

    @property
    def step(self) -> Tensor:
        return self.counters[-1:]

    def begin(self, ids: Tensor, mask: Tensor, prompt: int, uniforms: Tensor, eos: int) -> None:
        """Take prompts (B, P), padded on the left to `prompt` slots, and uniforms (B, steps)."""
        rows, at = len(ids), slice(prompt - ids.shape[1], prompt)
        self.ids.zero_()
        self.unseen.fill_(UNSEEN)
        self.ids[:rows, at] = ids
        self.unseen[:rows, at] = torch.where(mask, 0.0, UNSEEN).to(self.unseen.dtype)
        self.places[:, :prompt] = position_ids(self.unseen[:, :prompt] == 0)
        # A slot not seen yet counts with weight 0, which a NaN left there by another decode would outlive.
        self.cache[:, :, :, :, prompt:].zero_()
        self.uniforms[: uniforms.shape[1], :rows] = uniforms.t()
        # The choice moves on to the position and slot of the token that it takes.
        self.positions.copy_(self.places[:, prompt - 1])
        self.slot.fill_(prompt - 1)
        self.step.zero_()
        self.ended[:rows], self.ended[rows:] = False, True
        self.eos.fill_(eos)
