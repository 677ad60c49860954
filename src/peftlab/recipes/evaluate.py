"""`peftlab eval`: how good is a classifier, a language model, a summarizer or a reward model on held-out data?

Of runs that train a policy: `policy_eval.py` and `frontier.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import PromptCompletion, Text
from ..data.sources import load_records
from ..data.tokenize import document_ids, encode, pack
from ..errors import UserError
from ..evaluation.classification import classification_intervals, classification_metrics
from ..evaluation.explanations import GREEDY, evaluate_explanations
from ..evaluation.pairs import ScoredPairs, longer_wins, pair_intervals, pair_metrics
from ..evaluation.perplexity import perplexity, perplexity_intervals, row_nlls
from ..evaluation.summaries import SummaryFormat, score_summaries, summarize
from ..models.adapter_files import load_stack
from ..models.backbone import Backbone
from ..models.catalog import named
from ..models.classifier import TextClassifier, own_labels
from ..models.stacks import kind_of
from ..models.whole import load_reward
from ..runs.progress import doing
from ..sampling.sampler import Sampler
from .common import fitting_rows, too_long
from .frontier import draw_frontier
from .policy_eval import compare_policy, evaluate_policy
from .policy_options import PolicyOptions
from .policy_run import recipe_of

DATA = {"seq2seq": "imdb-gist:test"}
Columns = Mapping[str, str] | None


def run_eval(
    root: Path,
    names: Sequence[str],
    data: str | None,
    limit: int | None,
    device: str,
    columns: Columns,
    options: PolicyOptions,
) -> dict[str, Any]:
    """What `peftlab eval NAMES` prints: of runs of a policy, by name below `root` or folder, what `options` ask for.

    UserError where the options do not fit what the names are.
    """
    if len(names) > 1 and not options.frontier:
        raise UserError(f"eval: {len(names)} names; one at a time, or several runs with --frontier")
    places = [named(name, root) for name in names]
    folders = [Path(place) for place in places]
    other = next((place for place in places if recipe_of(Path(place)) is None), None)
    if other is not None:
        options.refuse(other)
        return evaluate(other, data, limit, device, columns)
    if columns:
        raise UserError("--columns: a policy's prompts are read as its run read them; leave it out")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give 1 or more")
    if options.frontier:
        return draw_frontier(folders, data, limit, device, options)
    if options.against:
        options = replace(options, against=named(options.against, root))
        return compare_policy(folders[0], data, limit, device, options)
    return evaluate_policy(folders[0], data, limit, device, options)


def evaluate(name: str, data: str | None, limit: int | None, device: str, columns: Columns = None) -> dict[str, Any]:
    """Metrics by their registry names, 95% intervals, rows and data hash. `limit` draws a seeded sample of rows.

    Without `data` it is the lab's test block, as its kind needs it; `columns` maps fields to columns of the user's.
    """
    kind = kind_of(name)
    measure = {"classifier": _classifier, "seq2seq": _summarizer, "reward": _reward_model}.get(kind, _language_model)
    if data is None and kind == "reward":
        raise UserError(f"eval: {name} is a reward model; give --data, rows of `prompt`, `chosen` and `rejected`")
    data = data or DATA.get(kind, "imdb:test")
    return {"model": name, "data": data, **measure(name, data, limit, device, columns)}


def _classifier(name: str, data: str, limit: int | None, device: str, columns: Columns) -> dict[str, Any]:
    classifier = TextClassifier.load(name, device=device)
    own = own_labels(classifier.labels)
    records = load_records(data, "classify", limit, labels=own, columns=columns)
    labels = np.array([record.label for record in records.records])
    if labels.max() >= len(classifier.labels):
        raise UserError(f"data {data}: has label {labels.max()}, but {name} knows {len(classifier.labels)} classes")
    doing(f"classifies {len(labels)} rows of {data}")
    probabilities = classifier.probabilities([record.text for record in records.records]).double().numpy()
    return {
        "rows": len(labels),
        "sha256": records.sha256,
        "metrics": classification_metrics(probabilities, labels),
        "intervals": classification_intervals(probabilities, labels),
    }


def _summarizer(name: str, data: str, limit: int | None, device: str, columns: Columns) -> dict[str, Any]:
    records = load_records(data, "summarize", limit, columns=columns)
    backbone, stack = load_stack(name, device=device)
    documents = [record.document for record in records.records]
    doing(f"summarizes {len(documents)} rows of {data}")
    texts = summarize(backbone.model, backbone.tokenizer, documents, SummaryFormat.of(stack.extra))
    scored = score_summaries(texts, records.records)
    return {
        "rows": len(texts),
        "sha256": records.sha256,
        "metrics": scored.metrics,
        "intervals": scored.intervals,
    }


def _reward_model(name: str, data: str, limit: int | None, device: str, columns: Columns) -> dict[str, Any]:
    """Which of two answers it prefers, against the data."""
    records = load_records(data, "preferences", limit, columns=columns)
    model = load_reward(name, device)
    doing(f"scores both answers of {len(records.records)} rows of {data}")
    pairs = ScoredPairs.of(model, records.records)
    return {
        "rows": len(records.records),
        "sha256": records.sha256,
        "metrics": pair_metrics(pairs) | {"compare/pair_accuracy_longer": longer_wins(pairs)},
        "intervals": pair_intervals(pairs),
    }


def _language_model(name: str, data: str, limit: int | None, device: str, columns: Columns) -> dict[str, Any]:
    """Perplexity on texts; on prompts with completions and labels, what the rubric says of the model's own answers."""
    records = load_records(data, "sft", limit, columns=columns)
    rows = records.records
    asked = all(isinstance(row, PromptCompletion) and row.label is not None for row in rows)
    if not asked and not all(isinstance(row, Text) for row in rows):
        raise UserError(
            f"data {data}: a language model is measured on rows that all have a `text`, for perplexity, or all a "
            "`prompt`, `completion` and `label`, for the rubric of explanations"
        )
    backbone, _ = load_stack(name, device=device)
    if asked:
        rows = _fitting(backbone, data, rows)
    doing(f"{'answers' if asked else 'reads'} {len(rows)} rows of {data}")
    found = _rubric(backbone, rows) if asked else _perplexity(backbone, [row.text for row in rows])
    return {"rows": len(rows), "sha256": records.sha256, **found}


def _fitting(backbone: Backbone, data: str, rows: list[PromptCompletion]) -> list[PromptCompletion]:
    """Those whose prompt leaves room for an answer; how many do not is told. UserError where none does."""
    longest = int(backbone.model.config.max_position_embeddings) - GREEDY.max_new_tokens
    prompts, taker = encode([row.prompt for row in rows], backbone.tokenizer), f"an answer of {GREEDY.max_new_tokens}"
    fitting = fitting_rows(None, data, prompts, longest, taker)
    if not fitting:
        raise UserError(f"data {data}: every prompt is {too_long(longest, taker)}")
    return [rows[row] for row in fitting]


def _rubric(backbone: Backbone, rows: list[PromptCompletion]) -> dict[str, Any]:
    told = evaluate_explanations(Sampler(backbone.model, backbone.tokenizer), rows)
    return {"metrics": told.metrics(), "intervals": told.intervals()}


def _perplexity(backbone: Backbone, texts: list[str]) -> dict[str, Any]:
    length = min(512, backbone.model.config.max_position_embeddings)
    sums, counts = row_nlls(
        backbone.model, pack(document_ids(texts, backbone.tokenizer), length), backbone.tokenizer.pad_token_id
    )
    return {
        "metrics": {"eval/perplexity": perplexity(sums, counts)},
        "intervals": perplexity_intervals(sums, counts),
    }
