"""`peftlab data preview`: what a model will see of the user's rows, token by token, and what is cut.

The rows are made by the very functions that the recipes train on; the same functions without their limits tell what
the limits cut. Only the tokenizer loads.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import is_config, load_config, recipe_in, shipped_configs
from ..data.prompts import openings
from ..data.records import Text
from ..data.sources import load_records
from ..data.tokenize import IGNORED
from ..errors import UserError, did_you_mean
from ..evaluation.summaries import MOST, SummaryFormat
from ..models.backbone import NEEDS, Task, load_tokenizer
from ..models.catalog import resolve
from ..models.classifier import own_labels
from ..models.stacks import read_stack
from . import classify, dpo, load, sft
from .common import load_rows

SAMPLE = 1000
ONE_EACH = "one of each"
UNLIMITED = 10**9


@dataclass(frozen=True)
class Piece:
    """Tokens that a model reads or writes in one go, and which of them count for the loss."""

    name: str
    ids: list[int]
    learned: list[bool]
    blocks: int = 1  # of training, that the tokens go on through


Made = tuple[list[list[Piece]], int]  # the pieces of each record, and how many rows they are in training
How = Callable[[Sequence[Any], Any], str]  # in words, how records of a config become those rows


@dataclass(frozen=True)
class Job:
    """How a recipe makes rows: its verb, the model it needs, the maker, its words, and the config without limits."""

    verb: str
    task: Task
    make: Callable[[Sequence[Any], Any, Any], Made]
    how: How
    unlimited: dict[str, Any]


def preview(spec: str, kind: str | None, model: str | None, rows: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The first `rows` records of `spec` as the job `kind` reads them, and the lengths of a sample of all.

    A config for `spec` stands for its train_data, and says what kind it is of. `model` None is the config's or the
    job's default; `overrides` are key=value pairs of its config. Raises UserError as the job would.
    """
    if rows < 0:
        raise UserError(f"--rows {rows}: give 0 or more")
    source = spec if is_config(spec) else None
    recipe = recipe_in(spec) if source else ""
    kind = kind or _kind(spec, source, recipe)
    if kind not in JOBS:
        raise UserError(f"--for {kind}: expected one of {', '.join(JOBS)}")
    job = JOBS[kind]
    verb = recipe if KINDS.get(recipe) == kind else job.verb
    config: Any = load_config(load(verb).CONFIG, source, overrides)
    config = config.with_(**({} if source else {"train_data": spec}), **({"model": model} if model else {}))
    tokenizer = _tokenizer(config.model, job.task)
    records, free = _records(config, kind), config.with_(**job.unlimited)
    sample = random.Random(config.seed).sample(records, SAMPLE) if len(records) > SAMPLE else records
    made, training_rows = job.make(sample, tokenizer, config)
    whole, _ = job.make(sample, tokenizer, free)
    first = records[:rows]
    shown = zip(first, job.make(first, tokenizer, config)[0], job.make(first, tokenizer, free)[0], strict=True)
    return {
        "job": verb,
        "model": config.model,
        "records": len(records),
        "rows": [_row(*triple, tokenizer, config) for triple in shown],
        "sample": len(sample),
        "training_rows": training_rows,
        "how": job.how(sample, config),
        "labels": dict(Counter(name for record in sample if (name := _label(record, config)))),
        "lengths": _lengths(made, whole),
    }


def _kind(spec: str, source: str | None, recipe: str) -> str:
    """What kind of rows a config's recipe reads; UserError where there is no config, or none that says."""
    if recipe in KINDS:
        return KINDS[recipe]
    if source and recipe:
        raise UserError(
            f"config {spec}: preview does not make the rows of {recipe}; give the data itself, as in "
            f"`peftlab data preview DATA --for {'preferences' if recipe == 'reward' else 'sft'}`"
        )
    hint = did_you_mean(spec, shipped_configs()) or f"or a config in the place of {spec}"
    raise UserError(f"preview: give --for with one of {', '.join(JOBS)}; {hint}")


def _tokenizer(name: str, task: Task) -> Any:
    """The tokenizer of a base, or of the base that an adapter stands on."""
    entry = resolve(name)
    if entry.kind == "adapter" and task == "causal":
        entry = resolve(read_stack(entry.path).base)
    kinds, needs = NEEDS[task]
    if entry.kind not in kinds:
        raise UserError(f"model {name}: is of kind {entry.kind}, but this job needs {needs}")
    return load_tokenizer(name, str(entry.path))


def _records(config: Any, kind: str) -> list[Any]:
    if kind == "prompts":
        return load_records(config.train_data, kind, seed=config.seed).records
    own = own_labels(config.labels) if kind == "classify" else None
    records = load_rows(config, "train", kind, own).records
    return classify.split(records, config)[0] if kind == "classify" else records


def _sft(records: Sequence[Any], tokenizer: Any, config: Any) -> Made:
    """A text longer than a block goes on in the next one, whose first token is not learned."""
    made = []
    for record in records:
        rows = sft.rows_of([record], tokenizer, config)
        learned = [label != IGNORED for row in rows for label in row["labels"]]
        made.append([Piece("row", [token for row in rows for token in row["input_ids"]], learned, len(rows))])
    return made, len(sft.rows_of(list(records), tokenizer, config))


def _classify(records: Sequence[Any], tokenizer: Any, config: Any) -> Made:
    """Of several views of a text the first, which is the text itself or its opening."""
    rows = classify.rows_of(list(records), tokenizer, config)
    return [[_read("text", row["input_ids"])] for row in rows[:: config.views]], len(rows)


def _summarize(records: Sequence[Any], tokenizer: Any, config: Any) -> Made:
    rows = SummaryFormat.of(config.model_dump()).rows(records, tokenizer)
    made = [
        [_read("document", row["input_ids"]), Piece("summary", row["labels"], [True] * len(row["labels"]))]
        for row in rows
    ]
    return made, len(rows)


def _prompts(records: Sequence[Any], tokenizer: Any, config: Any) -> Made:
    low, high = config.prompt_tokens
    rows = openings([record.prompt for record in records], tokenizer, low, high, config.seed)
    return [[_read("prompt", ids)] for ids in rows], len(rows)


def _preferences(records: Sequence[Any], tokenizer: Any, config: Any) -> Made:
    rows = dpo.rows_of(list(records), tokenizer, config)
    made = [
        [_read("prompt", row["prompt"]), *(Piece(n, row[n], [True] * len(row[n])) for n in ("chosen", "rejected"))]
        for row in rows
    ]
    return made, len(rows)


def _read(name: str, ids: list[int]) -> Piece:
    return Piece(name, ids, [False] * len(ids))


def _packed(records: Sequence[Any], config: Any) -> str:
    texts = sum(isinstance(record, Text) for record in records)
    packed = f"texts are packed, one behind the other, into rows of {config.max_length} tokens"
    return packed if texts == len(records) else f"{packed}; the others are a row each" if texts else ONE_EACH


def _viewed(_: Sequence[Any], config: Any) -> str:
    return ONE_EACH if config.views == 1 else f"{config.views} views of each"


def _one_each(_: Sequence[Any], __: Any) -> str:
    return ONE_EACH


MOST_TOKENS = {name: MOST[name] for name in ("max_length", "max_summary")}
JOBS = {
    "sft": Job("sft", "causal", _sft, _packed, {"max_length": UNLIMITED, "document_tokens": 0}),
    "classify": Job("classify", "classifier", _classify, _viewed, {"max_length": UNLIMITED, "crop": 0.0, "views": 1}),
    "summarize": Job("summarize", "seq2seq", _summarize, _one_each, MOST_TOKENS),
    "preferences": Job("dpo", "causal", _preferences, _one_each, {"max_length": UNLIMITED}),
    "prompts": Job("ppo", "causal", _prompts, _one_each, {"prompt_tokens": (0, 0)}),
}
KINDS = {job.verb: kind for kind, job in JOBS.items()} | {"rloo": "prompts"}  # a recipe -> the rows that it reads


def _label(record: Any, config: Any) -> str:
    """What the record's class is called, where the job learns classes."""
    return config.labels[record.label] if hasattr(config, "labels") else ""


def _row(record: Any, seen: list[Piece], whole: list[Piece], tokenizer: Any, config: Any) -> dict[str, Any]:
    pieces = [_piece(*both, tokenizer) for both in zip(seen, whole, strict=True)]
    return {"id": record.id, "label": _label(record, config), "pieces": pieces}


def _piece(seen: Piece, whole: Piece, tokenizer: Any) -> dict[str, Any]:
    tokens = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in seen.ids]
    cuts = [
        {"after": after, "tokens": len(ids), "text": tokenizer.decode(ids, clean_up_tokenization_spaces=False)}
        for after, ids in cut_out(whole.ids, seen.ids)
    ]
    facts = {"name": seen.name, "blocks": seen.blocks, "whole": len(whole.ids), "cuts": cuts}
    return {**facts, "tokens": tokens, "learned": seen.learned}


def cut_out(whole: list[int], seen: list[int]) -> list[tuple[int, list[int]]]:
    """What of `whole` is not in `seen`: (how many seen tokens stand before it, the tokens cut).

    `seen` is `whole` without one stretch, or one stretch of it. Where it is neither, as where a text was cut before it
    became tokens and its end became others, the stretch from the first difference on stands for what was cut.
    """
    extra = len(whole) - len(seen)
    if extra <= 0:
        return []
    if whole[extra:] == seen:
        return [(0, whole[:extra])]
    if whole[: len(seen)] == seen:
        return [(len(seen), whole[len(seen) :])]
    for start in range(1, extra):
        if whole[start] == seen[0] and whole[start : start + len(seen)] == seen:
            return [(0, whole[:start]), (len(seen), whole[start + len(seen) :])]
    front = next(i for i, (a, b) in enumerate(zip(whole, seen, strict=False)) if a != b)
    return [(front, whole[front : front + extra])]


def _lengths(made: list[list[Piece]], whole: list[list[Piece]]) -> list[dict[str, Any]]:
    """A row a piece, whole and as seen, and one for what is learned: how many tokens, and the share that is cut."""
    table = []
    for number, piece in enumerate(made[0]):
        full, seen = ([len(row[number].ids) for row in rows] for rows in (whole, made))
        cut = sum(a > b for a, b in zip(full, seen, strict=True)) / len(full)
        table += [_spread(piece.name, full, cut), _spread(f"{piece.name}, seen", seen, None)]
    learned = [sum(sum(piece.learned) for piece in row) for row in made]
    return [*table, _spread("learned", learned, None)] if any(learned) else table


def _spread(name: str, lengths: list[int], cut: float | None) -> dict[str, Any]:
    """The median and the 95th percentile are lengths that occur (nearest rank)."""
    ordered = sorted(lengths)
    at = {rank: ordered[max(0, -(-rank * len(ordered) // 100) - 1)] for rank in (50, 95)}
    share = None if cut is None else f"{cut:.1%}"
    return {"tokens": name, "min": ordered[0], "median": at[50], "p95": at[95], "max": ordered[-1], "cut": share}
