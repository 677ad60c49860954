"""Continuing one text: `generate`, and the sampler that data is built with."""

from __future__ import annotations

import math
from typing import Any

from ..errors import UserError
from ..models.adapter_files import load_stack
from ..sampling.sampler import Decoding, Sampler


def generate_texts(
    stack: str, prompt: str, count: int, max_new_tokens: int, temperature: float, top_p: float, seed: int, device: str
) -> list[dict[str, Any]]:
    """`count` completions of one prompt, each from its own seed."""
    for option, value, fits, wanted in (
        ("--count (-n)", count, count >= 1, "1 or more"),
        ("--max-new-tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("--temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "more than 0, at most 1"),
        ("--seed", seed, 0 <= seed < 2**32, "from 0 to 4294967295"),
    ):
        if not fits:
            raise UserError(f"{option} {value}: give {wanted}")
    sampler = load_sampler(stack, device)
    ids = sampler.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    context = sampler.model.config.max_position_embeddings
    if len(ids) + max_new_tokens > context:
        raise UserError(
            f"prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the context of {context}; "
            "shorten the prompt or --max-new-tokens"
        )
    decoding = Decoding(max_new_tokens, temperature, top_p=top_p)
    samples = sampler.sample([ids] * count, [seed + i for i in range(count)], decoding)
    return [{"prompt": prompt, "text": text, "seed": seed + i} for i, text in enumerate(sampler.texts(samples))]


def load_sampler(name: str, device: str, dtype: str = "float32") -> Sampler:
    """A sampler on a base or an adapter stack, merged."""
    backbone, stack = load_stack(name, device=device, dtype=dtype)
    if stack.kind != "causal":
        raise UserError(f"{name}: is a {stack.kind}, which cannot continue text; try `peftlab predict {name}`")
    return Sampler(backbone.model, backbone.tokenizer)
