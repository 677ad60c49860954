"""How a token is chosen from logits: temperature, truncation, and draws by uniforms that belong to the row.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
# Draws stop this far short of the total, by more than the rounding of a sum: there is always an entry that ends above.
REACH = 1 - 2**-20


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens. `temperature = 0` is greedy; top_k = 0 and top_p = 1 leave the distribution whole."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def row_uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """(B, steps) uniforms in [0, 1), row b from a generator seeded with seeds[b]; made on the CPU for any device."""
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
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # Scaling by the total absorbs the rounding of the sum; the first entry above the draw never has probability 0.
    draws = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    tokens = torch.searchsorted(cumulative, draws, right=True)
    if logits.device.type == "cpu":
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # where logits are NaN
    else:  # a parallel scan rounds otherwise than the sum: a draw may lie behind the last token that has a probability
        tokens = torch.minimum(tokens, (probabilities > 0).float().cumsum(-1).argmax(-1, keepdim=True))
    return tokens.squeeze(-1), probabilities.gather(-1, tokens).squeeze(-1).log()


def choose_in_blocks(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """What `choose` does, in three passes over the vocabulary and few small kernels: for a GPU.

    logits (B, V), V a multiple of BLOCK, filled up with -inf. A block is drawn by its mass, then a token within it:
    the same inversion of the same cumulative distribution, so the same uniforms give the same tokens up to rounding.
    """
    if decoding.temperature > 0 and (decoding.temperature != 1.0 or decoding.top_p < 1.0):
        logits = logits.float() / decoding.temperature
    if decoding.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        probabilities = logits.softmax(-1, dtype=torch.float32)
    else:
        probabilities = truncate(logits, decoding.top_k, decoding.top_p).softmax(-1, dtype=torch.float32)
        blocks = probabilities.view(len(logits), -1, BLOCK)
        masses = blocks.sum(-1)
        ends = masses.cumsum(-1)
        draws = uniforms.unsqueeze(-1) * (REACH * ends[:, -1:])
        block = _first(masses, ends, draws)
        draws = draws - (ends - masses).gather(-1, block)
        masses = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
        ends = masses.cumsum(-1)
        within = _first(masses, ends, torch.minimum(draws, REACH * ends[:, -1:]))
        tokens = within.add(block, alpha=BLOCK)
    return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0].log()


def _first(masses: Tensor, ends: Tensor, draws: Tensor) -> Tensor:
    """Index (B, 1) of the first mass (B, N) that is not 0 and ends above the draw (B, 1).

    A parallel scan is monotone only up to rounding: an entry without mass may seem to end above the one before it.
    """
    return torch.logical_and(ends > draws, masses).view(torch.uint8).argmax(-1, keepdim=True)


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
