"""Batched sampling from a causal language model, with its log-probabilities.

Shapes: B rows, P prompt tokens, C completion tokens, V vocabulary.

Each row draws from uniforms of its own seed, so what a row says does not depend on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..models.packed import addresses
from ..ops.masks import completion_mask
from ..runs.progress import say
from .choice import Decoding, choose, row_uniforms
from .engine import decoder_of
from .fused import fused_step
from .graphed import GraphedDecoder

__all__ = ["Decoding", "Sampler", "Samples"]

# Steps between looks at whether all rows have ended, on a GPU: a look waits for the device, a step too many costs one.
LOOK_EVERY = 8
# Rows that have ended leave the batch once so few of it are left: that copies its cache.
RETIRE = 0.8
# Final states (..., width) -> one number each, (...).
Read = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Samples:
    """prompt_ids, prompt_mask (B, P), left-padded; completion_ids, completion_mask, logprobs (B, C); ended (B,).

    `completion_mask` is True up to and including the EOS; `logprobs` are those of the distribution sampled from,
    0 where the mask is False; `ended` is True where the EOS was sampled. `readings` (B, C): what was read off the state
    that each token was chosen from, 0 where the mask is False; None unless asked for, or where states are not seen.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    ended: Tensor
    readings: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """Prompt and completion side by side, (B, P + C)."""
        return torch.cat([self.prompt_ids, self.completion_ids], 1)

    @property
    def mask(self) -> Tensor:
        """Attention mask of `ids`."""
        return torch.cat([self.prompt_mask, self.completion_mask], 1)


class Sampler:
    """Samples from `model`, a plain causal language model (merge adapters into it first, see Roles.twin)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        self._graphed: GraphedDecoder | None = None
        self._weights: tuple[int, ...] = ()  # where they lay when it was made

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token lists -> left-padded (ids, mask), (B, P). An empty prompt starts from EOS, the document boundary."""
        start = [self.pad_id if self.eos_id is None else self.eos_id]
        rows = [list(p) or start for p in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad_id] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[False] * (width - len(r)) + [True] * len(r) for r in rows])
        return ids.to(self.device), mask.to(self.device)

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], decoding: Decoding, read: Read | None = None
    ) -> Samples:
        """One completion a prompt. `prompts`: token lists; `seeds`: one integer a row; `read`: makes `readings`."""
        prompt_ids, prompt_mask = self.pad(prompts)
        read_off: list[Tensor] = []
        steps = list(self.decode(prompt_ids, prompt_mask, seeds, decoding, LOOK_EVERY, read, read_off))
        completion_ids = torch.stack([ids for ids, _ in steps], 1)
        mask = completion_mask(completion_ids, self.eos_id)
        width = int(mask.sum(1).max())
        completion_ids, mask = completion_ids[:, :width], mask[:, :width]
        logprobs = torch.stack([logp for _, logp in steps], 1)[:, :width] * mask
        ended = (completion_ids == (-1 if self.eos_id is None else self.eos_id)).any(1)
        completion_ids = completion_ids.masked_fill(~mask, self.pad_id)
        readings = torch.stack(read_off, 1)[:, :width] * mask if read_off else None
        return Samples(prompt_ids, prompt_mask, completion_ids, mask, logprobs, ended, readings)

    @torch.no_grad()
    def decode(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        seeds: Sequence[int],
        decoding: Decoding,
        look_every: int = 1,
        read: Read | None = None,
        readings: list[Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (token_ids, logprobs), each (B,), per step, until every row has ended or max_new_tokens is reached.

        A row that has ended goes on, or yields EOS. `look_every`: steps between looks at whether all rows have ended;
        on a CPU each step has one: it is free. `readings` takes what `read` makes of each step's states, by the end.
        """
        graphed = self._graphs()
        if graphed is not None:
            keep, made, turn = read is not None and readings is not None, 0, graphed.turn + 1
            for chosen in graphed.decode(prompt_ids, prompt_mask, seeds, self.eos_id, decoding, look_every, keep):
                made += 1
                yield chosen
            if read is not None and readings is not None:
                readings += read(graphed.states(turn, made, len(prompt_ids))).unbind()
            return
        count, end = len(prompt_ids), -1 if self.eos_id is None else self.eos_id
        uniforms = row_uniforms(seeds, decoding.max_new_tokens).to(self.device)
        rows = torch.arange(count, device=self.device)  # those that the decoder still reads
        ended = torch.zeros(count, dtype=torch.bool, device=self.device)
        decoder = decoder_of(self.model)
        logits = decoder.first(prompt_ids, prompt_mask)
        for step in range(decoding.max_new_tokens):
            tokens, logprobs = choose(logits, uniforms[rows, step], decoding)
            if read is not None and readings is not None and decoder.states is not None:
                values = read(decoder.states)
                readings.append(values.new_zeros(count).index_copy(0, rows, values))
            everyone = tokens.new_full((count,), end).index_copy(0, rows, tokens)
            yield everyone, logprobs.new_zeros(count).index_copy(0, rows, logprobs)
            ended |= everyone == end
            left = (~ended[rows]).nonzero().squeeze(1)
            if len(left) == 0 or step + 1 == decoding.max_new_tokens:
                return
            if len(left) <= RETIRE * len(rows):
                decoder.keep(left)
                rows, tokens = rows[left], tokens[left]
            logits = decoder.next(tokens)

    def _graphs(self) -> GraphedDecoder | None:
        """The decoder of CUDA graphs, made at first use and again where weights moved; None without one."""
        if self.device.type != "cuda":
            return None
        if self._graphed is None or self._weights != addresses(self.model):
            self._graphed = None  # its memory is free before the new one asks for it
            step = fused_step(self.model)
            if step is None:
                _say_once(type(self.model).__name__)
                return None
            self._graphed, self._weights = GraphedDecoder(step), addresses(self.model)
        return self._graphed

    def text(self, token_ids: Sequence[int] | Tensor) -> str:
        """Decoded text without special tokens, exactly as the tokens spell it."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def texts(self, samples: Samples) -> list[str]:
        """The completion of each row as text."""
        rows = zip(samples.completion_ids.tolist(), samples.completion_mask.sum(1).tolist(), strict=True)
        return [self.text(ids[:length]) for ids, length in rows]


@cache
def _say_once(kind: str) -> None:
    say(
        f"sampling: {kind} decodes by its own forward, token by token: CUDA graphs know GPT-2 and Llama models with no "
        "adapter attached"
    )
