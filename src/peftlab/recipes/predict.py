"""`peftlab predict`: the inference verb of every adapter and model, one text or a file of rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.check import BadRows, file_rows, rename_columns
from ..data.readers import READERS
from ..data.records import fields_of, row_id
from ..errors import UserError
from ..evaluation.summaries import SummaryFormat, summarize
from ..models.adapter_files import load_stack
from ..models.catalog import resolve
from ..models.classifier import TextClassifier
from ..models.stacks import kind_of
from ..models.whole import load_reward
from ..runs.atomic import write_rows
from ..sampling.sampler import Decoding
from .tools import load_sampler

# What is read of a row: the first of these fields that it has.
INPUT = {"text": ("text", "prompt", "document")}
ANSWER = {"prompt": ("prompt",), "completion": ("completion",)}  # for a reward model
MAY_BE_EMPTY = "completion"  # a policy may end its answer at once, and a reward has an opinion of that


def predict(
    adapter: str,
    text: str | None,
    source: Path | None,
    output: Path | None,
    device: str,
    columns: Mapping[str, str] | None = None,
) -> None:
    """Write one row per input row, in order; without `output`, rows go to standard output as JSON lines.

    `columns` maps a field to the column of `source` that it is.
    """
    if (text is None) == (source is None):
        raise UserError("predict: give either --text or --input")
    if text is not None and not text.strip():
        raise UserError("--text: is empty; give the text to predict")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    if output is not None and output.suffix.lower() in (".csv", ".tsv", ".parquet"):
        raise UserError(f"--output {output}: answers are JSON, one a line; give a name that ends in .jsonl")
    kind = kind_of(adapter)
    if kind == "reward" and source is None:
        raise UserError(f"predict: {adapter} scores an answer to a prompt; give --input with `prompt` and `completion`")
    if kind == "encoder":
        remedy = f"`peftlab classify model={adapter}` trains one"
        raise UserError(f"predict: {adapter} is an encoder without a head; {remedy}")
    if source is None and resolve(adapter).kind == "causal":
        raise UserError(
            f"predict: {adapter} is a model without an adapter, which only continues a text; "
            f"`peftlab generate {adapter} --prompt TEXT` does that"
        )
    wanted = ANSWER if kind == "reward" else INPUT
    rows = [{"id": 0, "text": text}] if source is None else _read(source, wanted, columns)
    verb = {"classifier": _classify, "seq2seq": _summarize, "reward": _score}.get(kind, _continue)
    answers = verb(adapter, rows, device)
    if output is not None:
        write_rows(output, answers)
        print(f"{len(answers)} rows: {output}")
    else:
        for answer in answers:
            print(json.dumps(answer))


def _classify(adapter: str, rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    classifier = TextClassifier.load(adapter, device=device)
    table = classifier.probabilities([row["text"] for row in rows]).tolist()
    answers = []
    for row, probabilities in zip(rows, table, strict=True):
        label = max(range(len(probabilities)), key=probabilities.__getitem__)
        told = {"label": label, "label_name": classifier.labels[label]}
        answers.append({"id": row["id"], **told, "probabilities": list(map(_rounded, probabilities))})
    return answers


def _continue(name: str, rows: list[dict[str, Any]], device: str, chunk: int = 32) -> list[dict[str, Any]]:
    """Greedy continuations, so that a prediction is a function of its input."""
    sampler, decoding = load_sampler(name, device), Decoding(max_new_tokens=64, temperature=0.0)
    room = sampler.model.config.max_position_embeddings - decoding.max_new_tokens
    answers = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        ids = [sampler.tokenizer(row["text"], add_special_tokens=False)["input_ids"][-room:] for row in part]
        texts = sampler.texts(sampler.sample(ids, [0] * len(part), decoding))
        answers += [{"id": row["id"], "text": text} for row, text in zip(part, texts, strict=True)]
    return answers


def _summarize(name: str, rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Summaries in the format that the adapter, or the model, was trained for."""
    backbone, stack = load_stack(name, device=device)
    documents = [row["text"] for row in rows]
    texts = summarize(backbone.model, backbone.tokenizer, documents, SummaryFormat.of(stack.extra))
    return [{"id": row["id"], "text": text} for row, text in zip(rows, texts, strict=True)]


def _score(name: str, rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Rewards, of mean 0 and variance 1 over the answers that an adapter was trained on; of a whole model, its own."""
    scores = load_reward(name, device).scores([row["prompt"] for row in rows], [row["completion"] for row in rows])
    return [{"id": row["id"], "score": _rounded(score)} for row, score in zip(rows, scores.tolist(), strict=True)]


def _rounded(value: float) -> float:
    """To six digits, as many as a float32 has: the rest of its 17 decimal ones says nothing."""
    return float(f"{value:.6g}")


def _read(
    path: Path, wanted: Mapping[str, tuple[str, ...]], columns: Mapping[str, str] | None
) -> list[dict[str, Any]]:
    """Rows with an id and what is `wanted` of them, strings; UserError naming every line that lacks it."""
    rows: list[dict[str, Any]] = []
    bad, told = BadRows(fold=sys.stderr.isatty()), []
    suffix = path.suffix.lower()
    known = suffix in (*READERS, ".tsv")  # else JSON lines: a pipe has a name without one, a file may be rows.2026-11
    for number, (line, row) in enumerate(file_rows(path, suffix if known else ".jsonl")):
        try:
            rows.append(_row(row, number, wanted, columns))
        except ValueError as error:
            told += bad.lines(f"{path}:{line}", str(error))
    if bad.count == 1:
        raise UserError(told[0])
    if bad.count:
        count = f"{path}: {bad.count} of {len(rows) + bad.count} rows are not usable:"
        more = bad.rest()
        everything = ["the command with 2> FILE lists every bad row"] if more else []
        raise UserError("\n".join([count, *told, *more, *everything]))
    if not rows:
        raise UserError(f"--input {path}: holds no rows; give one JSON object a line, or a CSV or Parquet file")
    return rows


def _row(
    row: Any, number: int, wanted: Mapping[str, tuple[str, ...]], columns: Mapping[str, str] | None
) -> dict[str, Any]:
    """What is `wanted` of a row, under its id or else its `number`. Raises ValueError where it lacks something."""
    if isinstance(row, ValueError):
        raise row
    given = rename_columns(row, columns) if isinstance(row, dict) else {}
    numbered = row_id(given) is None
    fields = {name: _telling(given, known) for name, known in wanted.items()}
    found = {name: given.get(field) for name, field in fields.items()}
    if not all(isinstance(value, str) for value in found.values()):
        strings = " and ".join(map(_alternatives, wanted.values()))
        null = next((f"; `{field}` is null" for field in fields.values() if field and given[field] is None), None)
        first = next(iter(wanted.values()))[0]
        hint = "" if columns else f"; --columns {first}=COLUMN names another"
        has = null or (f"; the row has {fields_of(row)}{hint}" if given and "" in fields.values() else "")
        raise ValueError(f"expected a row with a string {strings}{has}")
    blank = next((name for name, value in found.items() if name != MAY_BE_EMPTY and not str(value).strip()), None)
    if blank is not None:
        raise ValueError(f"`{fields[blank]}` is empty; give a text, or take the row out")
    return {"id": number if numbered else given["id"], **found}


def _telling(row: Mapping[str, Any], fields: tuple[str, ...]) -> str:
    """The first of these fields that is not empty, else the first that is there, or "". A table has all its columns in
    every row: what one leaves empty, the next may tell."""
    there = [field for field in fields if field in row]
    return next((field for field in there if row[field] not in (None, "")), (there or [""])[0])


def _alternatives(fields: tuple[str, ...]) -> str:
    """`text` (or `prompt`, or `document`)"""
    first, *others = (f"`{field}`" for field in fields)
    return f"{first} ({', '.join(f'or {other}' for other in others)})" if others else first
