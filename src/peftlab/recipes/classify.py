"""LoRA and a head on an encoder (or a causal language model) for text classification."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from ..data.collate import collate_tokens
from ..errors import UserError
from ..evaluation.calibration import confusion, fit_temperature, reliability, surest_errors
from ..evaluation.classification import classification_intervals, classification_metrics
from ..models.adapter_files import save_adapter
from ..models.adapters import LoraVariants, adapter_parameters, attach
from ..models.backbone import Backbone, load_backbone
from ..models.classifier import LABEL_NAMES, TextClassifier, classify_texts, encode, own_labels
from ..models.stacks import Stack
from ..runs.atomic import write_json
from ..runs.rundir import RunDir
from ..training.arguments import TrainConfig, total_steps, training_arguments
from ..training.trainer import LabTrainer
from .common import (
    load_both,
    load_rows,
    note_model,
    require_gradients,
    resume_point,
    say_measures,
    seed_everything,
    trained_parameters,
)

ADAPTER = "policy"
CROPS = (6, 48)
FEWEST_TO_CALIBRATE = 100
ERRORS_SHOWN = 20


class ClassifyConfig(TrainConfig):
    """Every key of `peftlab classify`."""

    recipe: Literal["classify"] = "classify"
    model: str = "minilm-distilbert"
    train_data: str = "imdb:train"
    eval_data: str = "imdb:test"
    train_limit: int = Field(0, ge=0, description="records to train on, a seeded sample; 0 = all; views multiply")
    eval_limit: int = Field(0, ge=0)
    max_length: int = Field(512, ge=8, description="tokens; longer texts lose their middle")
    views: int = Field(1, ge=1, description="rows made of a text: itself, and random passages of it")
    crop: float = Field(0.0, ge=0, le=1, description="share of rows cut to a random opening of 6 to 48 words")
    teacher: str = Field("", description="classifiers, joined by +; their mean probabilities are the targets")
    calibrate: float = Field(0.05, ge=0, lt=1, description="share of rows kept for the temperature, if 100 or more")
    labels: list[str] = Field(LABEL_NAMES, min_length=2)
    compare: str = Field("", description="another classifier, to be measured on as many tokens of the same rows")
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraVariants = LoraVariants()


CONFIG = ClassifyConfig


def run(config: ClassifyConfig, run: RunDir) -> dict[str, Any]:
    """Train adapter and head; accuracy, F1 and calibration on held-out rows, before and after."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        backbone = _base(config, config.device)
        note_model(run, "model", config.model, backbone.fingerprint)
        for key, name in [("compare", config.compare), *(("teacher", name) for name in _teachers(config))]:
            note_model(run, key, name)
        tokenizer = backbone.tokenizer
        labels = own_labels(config.labels)
        train, held_out = load_both(run, config, "classify", labels)
        other = _classifier(config, "compare", config.compare) if config.compare else None
        model = attach(backbone.model, config.lora, ADAPTER, "classifier", config.model)
        require_gradients(adapter_parameters(model, ADAPTER))
        train, kept = split(train, config)
        rows = rows_of(train, tokenizer, config, [_classifier(config, "teacher", n) for n in _teachers(config)])

        def logits_of(records: list[Any]) -> torch.Tensor:
            return classify_texts(model, tokenizer, [r.text for r in records], config.max_length)

        truth = np.array([record.label for record in held_out])
        say_measures(run)
        before = classification_metrics(_probabilities(logits_of(held_out)), truth)
        checkpoint = resume_point(run)
        if checkpoint is None:
            run.log(before | {"data/rows": len(rows)}, 0)
        trainer = LabTrainer(
            model,
            training_arguments(config, len(rows)),
            rows,
            [len(row["input_ids"]) for row in rows],
            lambda batch: _collate(batch, tokenizer.pad_token_id),
            run.checkpoints,
            run.log,
            lambda: run.stop_requested,
            loss=lambda output, targets: F.cross_entropy(output.logits.float(), targets),
        )
        with run.stepping():
            trainer.fit(checkpoint)
        if config.save_dtype == "bfloat16":
            _round(model)
        temperature = fit_temperature(logits_of(kept), torch.tensor([r.label for r in kept])) if kept else 1.0
        probabilities = _probabilities(logits_of(held_out) / temperature)
        after = classification_metrics(probabilities, truth) | ({"eval/temperature": temperature} if kept else {})
        if other is not None:
            alike = replace(other, max_length=min(other.max_length, config.max_length))
            guesses = alike.logits([r.text for r in held_out]).argmax(-1).numpy()
            after["compare/accuracy"] = float((guesses == truth).mean())
        run.log(after, trainer.state.global_step)
        run.write_samples(surest_errors(probabilities, held_out, config.labels, ERRORS_SHOWN))
        tables = {"confusion": confusion(probabilities, truth), "reliability": reliability(probabilities, truth)}
        write_json(run.path / "classifier.json", {"labels": config.labels, **tables})
        extra = {"labels": config.labels, "max_length": config.max_length, "temperature": temperature}
        stack = Stack("classifier", config.model, backbone.fingerprint, (), {"recipe": "classify", **extra})
        save_adapter(model, ADAPTER, run.path / "adapter", stack, dtype=config.save_dtype)
        return run.finish(after, before, classification_intervals(probabilities, truth), {"adapter": "adapter"})


def plan(config: ClassifyConfig) -> dict[str, Any]:
    """Sizes of the job, nothing trained."""
    backbone = _base(config, "cpu")
    records = load_rows(config, "train", "classify", own_labels(config.labels)).records
    model = attach(backbone.model, config.lora, ADAPTER, "classifier", config.model)
    require_gradients(adapter_parameters(model, ADAPTER))
    rows = rows_of(split(records, config)[0], backbone.tokenizer, config)
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "steps": total_steps(config, len(rows)),
        "trained parameters": trained_parameters(model),
    }


def _base(config: ClassifyConfig, device: str) -> Backbone:
    backbone = load_backbone(config.model, "classifier", device=device, num_labels=len(config.labels))
    context = getattr(backbone.model.config, "max_position_embeddings", config.max_length)
    if config.max_length > context:
        raise UserError(f"max_length: {config.max_length} exceeds the context of {config.model}, {context} tokens")
    return backbone


def rows_of(
    records: list[Any], tokenizer: Any, config: ClassifyConfig, teachers: Sequence[TextClassifier] = ()
) -> list[dict[str, Any]]:
    """Token ids and target of each view: the label, or the teachers' mean probabilities of what the view shows."""
    wrong = next((r for r in records if not 0 <= r.label < len(config.labels)), None)
    if wrong is not None:
        raise UserError(f"train_data: row {wrong.id} has label {wrong.label}; labels has {len(config.labels)} names")
    draw = random.Random(config.seed)
    views = [(view, record.label) for record in records for view in _views(record.text, config, draw)]
    texts = [text for text, _ in views]
    targets = [label for _, label in views]
    if teachers:
        targets = torch.stack([teacher.probabilities(texts) for teacher in teachers]).mean(0).tolist()
    encoded = encode(tokenizer, texts, config.max_length)
    return [{"input_ids": ids, "label": target} for ids, target in zip(encoded, targets, strict=True)]


def _views(text: str, config: ClassifyConfig, draw: random.Random) -> list[str]:
    """The text, or its opening for a `crop` share of texts (rewards and judges read openings); then random passages."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    views = [text]
    if draw.random() < config.crop:
        views[0] = text[: words[min(len(words), draw.randint(*CROPS)) - 1][1]]
    for _ in range(config.views - 1):
        length = draw.randint(min(CROPS[0], len(words)), len(words))
        start = draw.randint(0, len(words) - length)
        views.append(text[words[start][0] : words[start + length - 1][1]])
    return views


def split(records: list[Any], config: ClassifyConfig) -> tuple[list[Any], list[Any]]:
    """Rows to train on, and those kept to fit the temperature on; none are kept where they would be too few to tell."""
    count = int(config.calibrate * len(records))
    if count < FEWEST_TO_CALIBRATE:
        return records, []
    kept = set(random.Random(config.seed).sample(range(len(records)), count))
    return [r for i, r in enumerate(records) if i not in kept], [records[i] for i in sorted(kept)]


def _teachers(config: ClassifyConfig) -> list[str]:
    return [name.strip() for name in config.teacher.split("+")] if config.teacher else []


def _classifier(config: ClassifyConfig, key: str, name: str) -> TextClassifier:
    """The classifier that a key names; it must know the same labels in the same order."""
    found = TextClassifier.load(name, device=config.device)
    if found.labels != config.labels:
        raise UserError(f"{key} {name}: knows the labels {found.labels}, but labels is {config.labels}")
    return found


def _probabilities(logits: torch.Tensor) -> np.ndarray:
    return np.asarray(logits.double().softmax(-1))


def _collate(batch: Any, pad_id: int) -> dict[str, torch.Tensor]:
    padded = collate_tokens([row["input_ids"] for row in batch], pad_id)
    return padded | {"labels": torch.tensor([row["label"] for row in batch])}


@torch.no_grad()
def _round(model: Any) -> None:
    """Round what is saved to bfloat16 before it is measured, so that the figures are those of the saved adapter."""
    for parameter in adapter_parameters(model, ADAPTER).values():
        parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
