"""`peftlab eval`: how good is a classifier, or a language model, on held-out data?"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.records import Text
from ..data.sources import load_records
from ..data.tokenize import document_ids, pack
from ..errors import UserError
from ..evaluation.classification import classification_intervals, classification_metrics
from ..evaluation.perplexity import perplexity, perplexity_interval, row_nlls
from ..models.adapters import load_stack
from ..models.classifier import LABEL_NAMES, TextClassifier, is_classifier


def evaluate(name: str, data: str, limit: int | None, device: str) -> dict[str, Any]:
    """Metrics by their registry names, 95% intervals, rows and data hash. `limit` draws a seeded sample of rows."""
    measure = _classifier if is_classifier(name) else _language_model
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
