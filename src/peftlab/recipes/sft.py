"""LoRA fine-tuning of a causal language model on text, on (prompt, completion) pairs, or on conversations."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..data.collate import collate_language
from ..data.records import Conversation, PromptCompletion, Text
from ..data.tokenize import PLAIN_CHAT, Row, document_ids, encode, labelled, pack, prompt_completion
from ..errors import UserError
from ..evaluation.explanations import GREEDY, evaluate_explanations
from ..evaluation.perplexity import perplexity, perplexity_intervals, row_nlls
from ..models.adapter_files import load_stack, save_adapter
from ..models.adapters import LoraVariants, adapter_parameters, attach
from ..models.stacks import Stack, stack_over
from ..runs.rundir import RunDir
from ..sampling.sampler import Sampler
from ..training.arguments import TrainConfig, total_steps, training_arguments
from ..training.quick_passes import quick_passes
from ..training.sampler import row_length
from ..training.trainer import LabTrainer
from .common import (
    fitting_rows,
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


class SftConfig(TrainConfig):
    """Every key of `peftlab sft`."""

    recipe: Literal["sft"] = "sft"
    model: str = "tiny-gpt2"
    train_data: str = "imdb:train"
    eval_data: str = "imdb:test"
    train_limit: int = Field(0, ge=0, description="records to train on, a seeded sample; 0 = all")
    eval_limit: int = Field(500, ge=0)
    max_length: int = Field(512, ge=8, description="tokens of a packed block, or of a prompt with its completion")
    document_tokens: int = Field(0, ge=0, description="keep the first sentences that fit into so many tokens; 0 = all")
    answers: int = Field(0, ge=0, description="held-out prompts to answer before and after, scored by the rubric")
    lora: LoraVariants = LoraVariants(r=64, alpha=128)


CONFIG = SftConfig


def run(config: SftConfig, run: RunDir) -> dict[str, Any]:
    """Train the adapter, and measure held-out perplexity before and after."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        backbone, under = _base(config)
        note_model(run, "model", config.model, backbone.fingerprint)
        tokenizer = backbone.tokenizer
        train, held_out = load_both(run, config, "sft")
        rows, test = labelled(rows_of(train, tokenizer, config)), rows_of(held_out, tokenizer, config)
        if not rows:
            raise UserError(f"train_data {config.train_data}: no text has two tokens, of which the second is learned")
        model = attach(backbone.model, config.lora, ADAPTER, base=under.base)
        require_gradients(adapter_parameters(model, ADAPTER))
        model.config.use_cache = False

        asked = _asked(run, config, held_out, tokenizer, model.config.max_position_embeddings)

        def measure() -> tuple[dict[str, float], dict[str, tuple[float, float]], list[str]]:
            """Figures, their intervals, and the answers to `asked`."""
            sums, counts = row_nlls(model.eval(), test, tokenizer.pad_token_id)
            figures = {"eval/perplexity": perplexity(sums, counts)}
            intervals = perplexity_intervals(sums, counts)
            if not asked:
                return figures, intervals, []
            told = evaluate_explanations(Sampler(model, tokenizer), asked)
            return figures | told.metrics(), intervals | told.intervals(), told.answers

        # The fresh adapter is a no-op, so "before" is the base model; a resumed run finds the same value again.
        say_measures(run)
        before, _, said_before = measure()
        checkpoint = resume_point(run)
        if checkpoint is None:
            run.log(before | {"data/rows": len(rows), "data/tokens": sum(map(row_length, rows))}, 0)
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
        with quick_passes(model), run.stepping():
            trainer.fit(checkpoint)
        after, intervals, said_after = measure()
        run.log(after, trainer.state.global_step)
        if asked:
            run.write_samples(_samples(asked, {"before": said_before, "after": said_after}))
        save_adapter(model, ADAPTER, run.path / "adapter", stack_over(config.model, under, tokenizer, recipe="sft"))
        return run.finish(after, before, intervals, {"adapter": "adapter"})


def plan(config: SftConfig) -> dict[str, Any]:
    """Sizes of the job, nothing trained."""
    backbone, under = _base(config)
    records = load_rows(config, "train", "sft").records
    rows = rows_of(records, backbone.tokenizer, config)
    model = attach(backbone.model, config.lora, ADAPTER, base=under.base)
    require_gradients(adapter_parameters(model, ADAPTER))
    return {
        "rows": len(rows),
        "tokens": sum(map(row_length, rows)),
        "steps": total_steps(config, len(rows)),
        "trained parameters": trained_parameters(model),
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
    """All turns but the last, in the model's own chat template or the lab's plain one, and the last: what is learned.

    A plain template stays in the tokenizer, and `stack_over` notes it for whoever loads the adapter.
    """
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT
    *turns, answer = [{"role": m.role, "content": m.content} for m in record.messages]
    if not turns:
        raise UserError(f"train_data {config.train_data}: row {record.id} has no turn before the assistant's")
    prompt: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template([*turns, answer], tokenize=False)
    if not whole.startswith(prompt):  # a template that spells earlier turns anew, once another follows
        return prompt, answer["content"]
    # What ends a turn is learned with it; an EOS that the template writes is added by `prompt_completion`.
    return prompt, whole[len(prompt) :].rstrip().removesuffix(tokenizer.eos_token)


def _asked(
    run: RunDir, config: SftConfig, held_out: list[Any], tokenizer: Any, context: int
) -> list[PromptCompletion]:
    """The first `answers` held-out prompts that leave room for an answer in a context of so many tokens.

    How many do not is told. UserError where none does, or where one has no gold label: the rubric compares with it.
    """
    if not config.answers:
        return []
    if any(getattr(record, "label", None) is None for record in held_out):
        raise UserError(f"answers: {config.eval_data} has rows without prompt, completion and label; use answers=0")
    longest = context - GREEDY.max_new_tokens
    prompts = encode([record.prompt for record in held_out], tokenizer)
    fitting = fitting_rows(run, config.eval_data, prompts, longest, f"an answer of {GREEDY.max_new_tokens}")
    if not fitting:
        raise UserError(f"answers: every prompt of {config.eval_data} has more than {longest} tokens; use answers=0")
    return [held_out[row] for row in fitting[: config.answers]]


def _samples(asked: list[PromptCompletion], sides: dict[str, list[str]]) -> list[dict[str, str]]:
    return [
        {"prompt_id": record.id, "side": side, "prompt": record.prompt, "completion": answer}
        for side, answers in sides.items()
        for record, answer in zip(asked, answers, strict=True)
    ]


def _base(config: SftConfig) -> tuple[Any, Stack]:
    backbone, under = load_stack(config.model, device=config.device)
    if under.kind != "causal":
        raise UserError(f"model {config.model}: is a {under.kind}, but sft needs a causal language model")
    context = backbone.model.config.max_position_embeddings
    if config.max_length > context:
        raise UserError(f"max_length: {config.max_length} exceeds the context of {config.model}, {context} tokens")
    return backbone, under
