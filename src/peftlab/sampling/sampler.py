"""Batched sampling from a causal language model, with its log-probabilities.

Shapes: B rows, P prompt tokens, C completion tokens, V vocabulary.

Each row draws from uniforms of its own seed, so what a row says does not depend on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.masks import completion_mask
from .engine import decoder_of


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens. `temperature = 0` is greedy; top_k = 0 and top_p = 1 leave the distribution whole."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Samples:
    """prompt_ids, prompt_mask (B, P), left-padded; completion_ids, completion_mask, logprobs (B, C); ended (B,).

    `completion_mask` is True up to and including the EOS; `logprobs` are those of the distribution sampled from,
    0 where the mask is False; `ended` is True where the EOS was sampled.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    ended: Tensor

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

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], decoding: Decoding) -> Samples:
        """One completion a prompt. `prompts`: token lists; `seeds`: one integer a row."""
        prompt_ids, prompt_mask = self.pad(prompts)
        steps = list(self.decode(prompt_ids, prompt_mask, seeds, decoding))
        completion_ids = torch.stack([ids for ids, _ in steps], 1)
        mask = completion_mask(completion_ids, self.eos_id)
        logprobs = torch.stack([logp for _, logp in steps], 1) * mask
        ended = (completion_ids == (-1 if self.eos_id is None else self.eos_id)).any(1)
        completion_ids = completion_ids.masked_fill(~mask, self.pad_id)
        return Samples(prompt_ids, prompt_mask, completion_ids, mask, logprobs, ended)

    @torch.no_grad()
    def decode(
        self, prompt_ids: Tensor, prompt_mask: Tensor, seeds: Sequence[int], decoding: Decoding
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (token_ids, logprobs), each (B,), per step, until every row has ended or max_new_tokens is reached."""
        uniforms = row_uniforms(seeds, decoding.max_new_tokens).to(self.device)
        ended = torch.zeros(len(prompt_ids), dtype=torch.bool, device=self.device)
        decoder = decoder_of(self.model)
        logits = decoder.first(prompt_ids, prompt_mask, decoding.max_new_tokens)
        for step in range(decoding.max_new_tokens):
            tokens, logprobs = choose(logits, uniforms[:, step], decoding)
            yield tokens, logprobs
            if self.eos_id is not None:
                ended |= tokens == self.eos_id
                if ended.all():
                    return
            if step + 1 < decoding.max_new_tokens:
                logits = decoder.next(tokens)

    def text(self, token_ids: Sequence[int] | Tensor) -> str:
        """Decoded text without special tokens, exactly as the tokens spell it."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def texts(self, samples: Samples) -> list[str]:
        """The completion of each row as text."""
        rows = zip(samples.completion_ids.tolist(), samples.completion_mask.sum(1).tolist(), strict=True)
        return [self.text(ids[:length]) for ids, length in rows]


def row_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """(B, steps) uniforms in [0, 1), row b from a generator seeded with seeds[b]; float64, made on the CPU."""
    generator = torch.Generator()
    rows = [torch.rand(steps, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).float().clamp(max=1 - 2**-24)


def choose(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Sample a token a row by inverting the cumulative distribution at `uniforms`.

    logits (B, V), uniforms (B,). Returns tokens (B,) and their log-probabilities (B,) under the distribution that was
    sampled from (temperature and truncation included; greedy reports the untempered one).
    """
    logits = logits.float()
    if decoding.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    if decoding.temperature != 1.0:
        logits = logits / decoding.temperature
    logits = truncate(logits, decoding.top_k, decoding.top_p)
    probabilities = (logits - logits.logsumexp(-1, keepdim=True)).exp()
    cumulative = probabilities.cumsum(-1)
    # Scaling by the total absorbs the rounding of the sum; the first entry above the draw never has probability 0.
    draws = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    last = (probabilities > 0).float().cumsum(-1).argmax(-1, keepdim=True)
    tokens = torch.minimum(torch.searchsorted(cumulative, draws, right=True), last)
    logprobs = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    return tokens.squeeze(-1), logprobs.squeeze(-1)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits outside the top k, or outside the smallest set of mass top_p (Holtzman et al. 2020), to -inf."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(mass_before, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits
