"""The lab's config keys in the words of TrainingArguments."""

from __future__ import annotations

import tempfile
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from transformers import TrainingArguments

from ..config import Config
from ..data.check import known_fields
from ..models.backbone import pick_device


class TrainConfig(Config):
    """Keys that every supervised recipe has. Steps are optimizer steps; `save_every` 0 saves only at the end."""

    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the matmuls; auto: bfloat16 on CUDA")
    lr: float = Field(5e-4, gt=0)
    epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(0, ge=0, description="stop after so many steps; 0 = after the epochs")
    batch_size: int = Field(16, ge=1, description="rows of an optimizer step")
    accumulate: int = Field(1, ge=1, description="parts of a batch, one after the other: less memory, the same step")
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    save_every: int = Field(0, ge=0)
    columns: dict[str, str] = Field({}, description="field -> the data's column of it, where its name is another")
    on_bad_row: Literal["stop", "skip"] = Field("stop", description="skip: train without it, and record it in the run")

    _fields_exist = field_validator("columns")(known_fields)

    @model_validator(mode="after")
    def _parts_are_equal(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} equal parts do not make a batch_size of {self.batch_size}")
        return self


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a training on `rows` rows an epoch, one at least."""
    return config.max_steps or max(1, int(config.epochs * -(-rows // config.batch_size)))


def training_arguments(config: TrainConfig, rows: int, workers: int = 0) -> TrainingArguments:
    """TrainingArguments that keep to themselves: no Hub, no tracker, no files of their own.

    `workers`: processes that make the batches of a GPU ahead of it.
    """
    device = pick_device(config.device)
    steps = total_steps(config, rows)
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=steps,
        # Of all processes together: LabTrainer gives each its rows.
        per_device_train_batch_size=config.batch_size // config.accumulate,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=int(config.warmup_fraction * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_every or steps,
        eval_strategy="no",
        logging_steps=max(1, min(10, steps // 50)),
        logging_first_step=True,  # a person sees at once that it learns
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=workers if device.type == "cuda" else 0,
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": device.type == "cuda"},  # else the host waits for each batch's copy
        torch_empty_cache_steps=None,
        # True multiplies the loss by the number of processes, to undo a division that our mean losses never made.
        average_tokens_across_devices=False,
        ddp_find_unused_parameters=False,
    )
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1  # else Trainer splits each batch over every GPU it sees; several GPUs go by accelerate
    return arguments
