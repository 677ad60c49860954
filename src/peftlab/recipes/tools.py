"""Small verbs: pull, models, generate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..data.sources import load_records
from ..errors import UserError, did_you_mean
from ..models.adapter_files import load_stack
from ..models.catalog import list_models, resolve
from ..models.stacks import read_stack
from ..sampling.sampler import Decoding, Sampler

IMDB = "imdb"  # data that `pull` fetches; any other name is a model's


def pull_names(names: list[str]) -> dict[str, Path]:
    """Fetch and convert what each name needs; where it lies now."""
    places = {}
    for name in names:
        if near := did_you_mean(name, [IMDB], 0.75) if name != IMDB and not Path(name).exists() else "":
            raise UserError(f"pull {name}: no such data or model; {near}")
    for name in names:
        if name == IMDB:
            load_records("imdb:test", "sft")
        places[name] = _imdb_folder() if name == IMDB else Path(resolve(name).path)
    return places


def model_rows() -> list[dict[str, Any]]:
    """One row a model that loads by name; an adapter's tells the base under it."""
    return [
        {
            "name": entry.name,
            "kind": entry.kind,
            "base": read_stack(entry.path).base if entry.kind == "adapter" else None,
            "origin": entry.origin,
            "licence": entry.licence,
            "size": entry.size,
        }
        for entry in list_models()
    ]


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


def _imdb_folder() -> Path:
    from ..data.imdb import blocks_folder

    return blocks_folder()
