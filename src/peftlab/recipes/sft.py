"""LoRA fine-tuning of a causal language model on text or on (prompt, completion) pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..data.collate import collate_language
from ..data.records import Conversation, PromptCompletion, Text
from ..data.tokenize import Row, document_ids, pack, prompt_completion
from ..errors import UserError
from ..evaluation.perplexity import perplexity, perplexity_interval, row_nlls
from ..models.adapters import Lora, Stack, adapter_parameters, attach, load_stack, save_adapter
from ..models.catalog import resolve
from ..runs.rundir import RunDir
from ..training.arguments import TrainConfig, training_arguments
from ..training.trainer import LabTrainer
from .common import load_recorded, require_gradients, resume_point, seed_everything, trained_parameters

ADAPTER = "policy"


class SftConfig(TrainConfig):
    """Every key of `peftlab sft`."""

    recipe: Literal["sft"] = "sft"
    model: str = "tiny-gpt2"
    train_data: str = "imdb:train"
    eval_data: str = "imdb:test"
    train_limit: int = Field(0, ge=0, description="rows to train on, a seeded sample; 0 = all")
    eval_limit: int = Field(500, ge=0)
    max_length: int = Field(512, ge=8, description="tokens of a packed block, or of a prompt with its completion")
    document_tokens: int = Field(0, ge=0, description="keep the first sentences that fit into so many tokens; 0 = all")
    lora: Lora = Lora(r=64, alpha=128)


CONFIG = SftConfig


def run(config: SftConfig, run: RunDir) -> dict[str, Any]:
    """Train the adapter, and measure held-out perplexity before and after."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        backbone, under = _base(config)
        tokenizer = backbone.tokenizer
        train = load_recorded(run, config.train_data, "sft", config.train_limit, config.seed).records
        held_out = load_recorded(run, config.eval_data, "sft", config.eval_limit, config.seed).records
        rows, test = rows_of(train, tokenizer, config), rows_of(held_out, tokenizer, config)
        model = attach(backbone.model, config.lora, ADAPTER, base=under.base)
        require_gradients(adapter_parameters(model, ADAPTER))
        model.config.use_cache = False

        # The fresh adapter is a no-op, so "before" is the base model; a resumed run finds the same value again.
        sums, counts = row_nlls(model, test, tokenizer.pad_token_id)
        before = perplexity(sums, counts)
        checkpoint = resume_point(run)
        if checkpoint is None:
            run.log({"eval/perplexity": before, "data/rows": len(rows), "data/tokens": sum(map(row_length, rows))}, 0)
        trainer = LabTrainer(
            model,
            training_arguments(config, len(rows)),
            rows,
            [row_length(row) for row in rows],
            lambda batch: collate_language(batch, tokenizer.pad_token_id),
            run.checkpoints,
            run.log,
            lambda: run.stop_requested,
        )
        trainer.fit(checkpoint)
        sums, counts = row_nlls(model, test, tokenizer.pad_token_id)
        after = perplexity(sums, counts)
        run.log({"eval/perplexity": after}, trainer.state.global_step)
        save_adapter(model, ADAPTER, run.path / "adapter", stack_of(config, under))
        return run.finish(
            {"eval/perplexity": after},
            {"eval/perplexity": before},
            {"eval/perplexity": perplexity_interval(sums, counts)},
            {"adapter": "adapter"},
        )


def plan(config: SftConfig) -> dict[str, Any]:
    """Sizes of the job, nothing trained."""
    from ..data.sources import load_records

    backbone, under = _base(config)
    records = load_records(config.train_data, "sft", config.train_limit or None, config.seed).records
    rows = rows_of(records, backbone.tokenizer, config)
    model = attach(backbone.model, config.lora, ADAPTER, base=under.base)
    require_gradients(adapter_parameters(model, ADAPTER))
    steps = config.max_steps or int(config.epochs * -(-len(rows) // config.batch_size))
    return {
        "rows": len(rows),
        "tokens": sum(map(row_length, rows)),
        "steps": steps,
        "trained parameters": trained_parameters(model),
        "bytes of one batch's logits": config.batch_size * config.max_length * backbone.model.config.vocab_size * 4,
    }


def rows_of(records: list[Any], tokenizer: Any, config: SftConfig) -> list[Row]:
    """Texts are packed into blocks; prompt and completion stay a row of their own."""
    texts = [r.text for r in records if isinstance(r, Text)]
    pairs = [(r.prompt, r.completion) for r in records if isinstance(r, PromptCompletion)]
    pairs += [_as_pair(r, tokenizer, config) for r in records if isinstance(r, Conversation)]
    if len(texts) + len(pairs) < len(records):
        raise UserError(f"train_data {config.train_data}: rows of `text`, `prompt` and `completion`, or `messages`")
    rows = pack(document_ids(texts, tokenizer, config.document_tokens), config.max_length)
    return rows + [prompt_completion(*pair, tokenizer, config.max_length) for pair in pairs]


def _as_pair(record: Conversation, tokenizer: Any, config: SftConfig) -> tuple[str, str]:
    """All turns but the last, in the model's own template, and the last, which is what is learned."""
    if not tokenizer.chat_template:
        raise UserError(f"model {config.model}: has no chat template for `messages`; give `prompt` and `completion`")
    *turns, answer = [{"role": m.role, "content": m.content} for m in record.messages]
    if not turns:
        raise UserError(f"train_data {config.train_data}: row {record.id} has no turn before the assistant's")
    prompt: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return prompt, answer["content"]


def row_length(row: Row) -> int:
    """Tokens of a row."""
    return len(row["input_ids"])


def stack_of(config: SftConfig, under: Stack) -> Stack:
    """What the new adapter stands on."""
    entry = resolve(config.model)
    merged = (*under.under, Path(entry.path)) if entry.kind == "adapter" else ()
    return Stack("causal", under.base, under.fingerprint, merged, {"recipe": "sft"})


def _base(config: SftConfig) -> tuple[Any, Stack]:
    backbone, under = load_stack(config.model, device=config.device)
    if under.kind != "causal":
        raise UserError(f"model {config.model}: is a {under.kind}, but sft needs a causal language model")
    context = backbone.model.config.max_position_embeddings
    if config.max_length > context:
        raise UserError(f"max_length: {config.max_length} exceeds the context of {config.model}, {context} tokens")
    return backbone, under
