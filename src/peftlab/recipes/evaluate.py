"""`peftlab eval`: how good is a classifier, a language model or a summarizer on held-out data?"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.records import Text
from ..data.sources import load_records
from ..data.tokenize import document_ids, pack
from ..errors import UserError
from ..evaluation.classification import classification_intervals, classification_metrics
from ..evaluation.perplexity import perplexity, perplexity_interval, row_nlls
from ..evaluation.summaries import SummaryFormat, score_summaries, summarize
from ..models.adapters import kind_of, load_stack
from ..models.classifier import LABEL_NAMES, TextClassifier

DATA = {"seq2seq": "imdb-gist:test"}


def evaluate(name: str, data: str | None, limit: int | None, device: str) -> dict[str, Any]:
    """Metrics by their registry names, 95% intervals, rows and data hash. `limit` draws a seeded sample of rows.

    Without `data` it is the lab's test block, as its kind needs it.
    """
    kind = kind_of(name)
    measure = {"classifier": _classifier, "seq2seq": _summarizer}.get(kind, _language_model)
    data = data or DATA.get(kind, "imdb:test")
    return {"model": name, "data": data, **measure(name, data, limit, device)}


def _classifier(name: str, data: str, limit: int | None, device: str) -> dict[str, Any]:
    classifier = TextClassifier.load(name, device=device)
    own = None if classifier.labels == LABEL_NAMES else classifier.labels
    records = load_records(data, "classify", limit, labels=own)
    labels = np.array([record.label for record in records.records])
    if labels.max() >= len(classifier.labels):
        raise UserError(f"data {data}: has label {labels.max()}, but {name} knows {len(classifier.labels)} classes")
    probabilities = classifier.probabilities([record.text for record in records.records]).double().numpy()
    return {
        "rows": len(labels),
        "sha256": records.sha256,
        "metrics": classification_metrics(probabilities, labels),
        "intervals": classification_intervals(probabilities, labels),
    }


def _summarizer(name: str, data: str, limit: int | None, device: str) -> dict[str, Any]:
    records = load_records(data, "summarize", limit)
    backbone, stack = load_stack(name, device=device)
    documents = [record.document for record in records.records]
    texts = summarize(backbone.model, backbone.tokenizer, documents, SummaryFormat.of(stack.extra))
    scored = score_summaries(texts, records.records)
    return {
        "rows": len(texts),
        "sha256": records.sha256,
        "metrics": scored.metrics,
        "intervals": scored.intervals,
    }


def _language_model(name: str, data: str, limit: int | None, device: str) -> dict[str, Any]:
    records = load_records(data, "sft", limit)
    texts = [record.text for record in records.records if isinstance(record, Text)]
    if len(texts) < len(records.records):
        raise UserError(f"data {data}: perplexity is measured on rows with a `text`, not on prompts with completions")
    backbone, _ = load_stack(name, device=device)
    length = min(512, backbone.model.config.max_position_embeddings)
    sums, counts = row_nlls(
        backbone.model, pack(document_ids(texts, backbone.tokenizer), length), backbone.tokenizer.pad_token_id
    )
    return {
        "rows": len(texts),
        "sha256": records.sha256,
        "metrics": {"eval/perplexity": perplexity(sums, counts)},
        "intervals": {"eval/perplexity": perplexity_interval(sums, counts)},
    }
