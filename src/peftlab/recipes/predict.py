"""`peftlab predict`: the inference verb of every adapter, one text or a file of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.summaries import SummaryFormat, summarize
from ..models.adapters import kind_of, load_stack
from ..models.classifier import TextClassifier
from ..runs.atomic import write_rows
from ..sampling.sampler import Decoding
from .tools import load_sampler

FIELDS = ("text", "prompt", "document")  # the first that a row has is its input


def predict(adapter: str, text: str | None, source: Path | None, output: Path | None, device: str) -> None:
    """Write one row per input row, in order; without `output`, rows go to standard output as JSON lines."""
    if (text is None) == (source is None):
        raise UserError("predict: give either --text or --input")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    rows = [{"id": 0, "text": text}] if text is not None else _read(source)  # type: ignore[arg-type]
    verb = {"classifier": _classify, "seq2seq": _summarize}.get(kind_of(adapter), _continue)
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
        name = classifier.labels[label]
        answers.append({"id": row["id"], "label": label, "label_name": name, "probabilities": probabilities})
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


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows with an id and a text; every bad line is named."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error.msg}") from None
        fields = [row[name] for name in FIELDS if name in row] if isinstance(row, dict) else []
        if not fields or not isinstance(text := fields[0], str):
            raise UserError(f"{path}:{number}: expected an object with a string `text` (or `prompt`, or `document`)")
        rows.append({"id": row.get("id", len(rows)), "text": text})
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows
