"""LoRA and a head on an encoder (or a causal language model) for text classification."""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from ..errors import UserError
from ..evaluation.classification import classification_intervals, classification_metrics
from ..models.adapters import Lora, Stack, adapter_parameters, attach, save_adapter
from ..models.backbone import Backbone, load_backbone
from ..models.classifier import LABEL_NAMES, TextClassifier, classify_texts, pad_right
from ..runs.rundir import RunDir
from ..training.arguments import TrainConfig, training_arguments
from ..training.trainer import LabTrainer
from .common import load_recorded, require_gradients, resume_point, seed_everything, trained_parameters

ADAPTER = "policy"
CROPS = (8, 64)


class ClassifyConfig(TrainConfig):
    """Every key of `peftlab classify`."""

    recipe: Literal["classify"] = "classify"
    model: str = "minilm-distilbert"
    train_data: str = "imdb:train"
    eval_data: str = "imdb:test"
    train_limit: int = Field(0, ge=0, description="rows to train on, a seeded sample; 0 = all")
    eval_limit: int = Field(0, ge=0)
    max_length: int = Field(512, ge=8, description="tokens; longer texts are cut")
    crop: float = Field(0.0, ge=0, le=1, description="share of rows cut to a random opening of 8 to 64 tokens")
    labels: list[str] = Field(LABEL_NAMES, min_length=2)
    compare: str = Field("", description="another classifier, to be measured on the same held-out rows")
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    lora: Lora = Lora()


CONFIG = ClassifyConfig


def run(config: ClassifyConfig, run: RunDir) -> dict[str, Any]:
    """Train adapter and head; accuracy, F1 and calibration on held-out rows, before and after."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        backbone = _base(config, config.device)
        tokenizer = backbone.tokenizer
        labels, seed = _own_labels(config), config.seed
        train = load_recorded(run, config.train_data, "classify", config.train_limit, seed, labels).records
        held_out = load_recorded(run, config.eval_data, "classify", config.eval_limit, seed, labels).records
        other = TextClassifier.load(config.compare, device=config.device) if config.compare else None
        model = attach(backbone.model, config.lora, ADAPTER, "classifier", config.model)
        require_gradients(adapter_parameters(model, ADAPTER))
        rows = rows_of(train, tokenizer, config)
        truth = np.array([record.label for record in held_out])

        def measure() -> np.ndarray:
            logits = classify_texts(model, tokenizer, [r.text for r in held_out], config.max_length)
            return np.asarray(logits.double().softmax(-1))

        before = classification_metrics(measure(), truth)
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
        )
        trainer.fit(checkpoint)
        if config.save_dtype == "bfloat16":
            _round(model)
        probabilities = measure()
        after = classification_metrics(probabilities, truth)
        if other is not None:
            guesses = other.logits([r.text for r in held_out]).argmax(-1).numpy()
            after["compare/accuracy"] = float((guesses == truth).mean())
        run.log(after, trainer.state.global_step)
        extra = {"recipe": "classify", "labels": config.labels, "max_length": config.max_length}
        stack = Stack("classifier", config.model, backbone.fingerprint, (), extra)
        save_adapter(model, ADAPTER, run.path / "adapter", stack, dtype=config.save_dtype)
        return run.finish(after, before, classification_intervals(probabilities, truth), {"adapter": "adapter"})


def plan(config: ClassifyConfig) -> dict[str, Any]:
    """Sizes of the job, nothing trained."""
    from ..data.sources import load_records

    backbone = _base(config, "cpu")
    records = load_records(
        config.train_data, "classify", config.train_limit or None, config.seed, _own_labels(config)
    ).records
    model = attach(backbone.model, config.lora, ADAPTER, "classifier", config.model)
    require_gradients(adapter_parameters(model, ADAPTER))
    rows = rows_of(records, backbone.tokenizer, config)
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "steps": config.max_steps or int(config.epochs * -(-len(rows) // config.batch_size)),
        "trained parameters": trained_parameters(model),
    }


def _base(config: ClassifyConfig, device: str) -> Backbone:
    backbone = load_backbone(config.model, "classifier", device=device, num_labels=len(config.labels))
    context = getattr(backbone.model.config, "max_position_embeddings", config.max_length)
    if config.max_length > context:
        raise UserError(f"max_length: {config.max_length} exceeds the context of {config.model}, {context} tokens")
    return backbone


def rows_of(records: list[Any], tokenizer: Any, config: ClassifyConfig) -> list[dict[str, Any]]:
    """Token ids and label of each record. A `crop` share of rows is cut to its opening: the judge reads openings."""
    wrong = next((r for r in records if not 0 <= r.label < len(config.labels)), None)
    if wrong is not None:
        raise UserError(f"train_data: row {wrong.id} has label {wrong.label}; labels has {len(config.labels)} names")
    encoded = tokenizer([r.text for r in records], truncation=True, max_length=config.max_length)["input_ids"]
    draw = random.Random(config.seed)
    rows = []
    for record, ids in zip(records, encoded, strict=True):
        if draw.random() < config.crop:
            ids = ids[: draw.randint(*CROPS)]
        rows.append({"input_ids": ids, "label": record.label})
    return rows


def _own_labels(config: ClassifyConfig) -> list[str] | None:
    """None for the default names, which also lets data say neg, pos, 0 and 1."""
    return None if config.labels == LABEL_NAMES else config.labels


def _collate(batch: Any, pad_id: int) -> dict[str, torch.Tensor]:
    padded = pad_right([row["input_ids"] for row in batch], pad_id)
    return padded | {"labels": torch.tensor([row["label"] for row in batch])}


@torch.no_grad()
def _round(model: Any) -> None:
    """Round what is saved to bfloat16 before it is measured, so that the figures are those of the saved adapter."""
    for parameter in adapter_parameters(model, ADAPTER).values():
        parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
