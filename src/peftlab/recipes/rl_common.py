"""What `ppo` and `rloo` share around the algorithm: keys, models and data, the loop over steps, the evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator

from ..data.sources import load_records
from ..data.tokenize import encode
from ..errors import Interrupted, LabError, UserError
from ..evaluation.policy import Measure
from ..models.adapter_files import load_stack, save_adapter
from ..models.backbone import Backbone, pick_device
from ..models.catalog import resolve
from ..models.roles import POLICY, Roles
from ..models.stacks import Stack, kind_of, stack_over
from ..ops import ranks
from ..rewards.parts import Reward
from ..rewards.spec import reward_of, terms
from ..rl.control import AdaptiveKL, FixedKL
from ..rl.gather import all_or_none
from ..rl.rollout import PromptBatch, Rollout, rows_per_pass
from ..rl.trainer import PolicyTrainer, UpdateSettings
from ..runs.metrics import first_ratio_limit
from ..runs.progress import Progress, say
from ..runs.rundir import RunDir
from ..sampling.sampler import Decoding, Sampler
from .before_after import before_after, longest_prompt, policy_stack, prompt_batch
from .common import note_function, note_leak, note_model, resume_point, say_measures
from .several import of_first
from .tasks import TASKS
from .tasks.config import TaskConfig
from .tasks.task import WHOLE

RECORDED_ROWS = 4
NORMALISE_ON = 256
SHORT = 16  # tokens of a prompt, up to which the float noise of tiny-gpt2 is known to be small
Settings = TypeVar("Settings", bound=UpdateSettings)


class PolicyConfig(TaskConfig):
    """What both recipes take. Times are in steps (one rollout and its update), lengths in tokens, KL in nats."""

    CALLED: ClassVar = {"train": "train_data", "test": "eval_data"}

    train_data: str = "imdb:train"
    eval_data: str = "imdb:prompts"
    reward: str = Field(
        "imdb-sentiment",
        description="parts joined by +, as in imdb-sentiment + 0.5*rubric:length: classifiers (log-odds of `want`; "
        "p(NAME): its probability), reward models, parts of the rubric, module:function",
    )
    style: list[str] = Field([], description="patterns of rubric:style that an answer keeps to; behind a !, avoids")
    temperature: float = Field(1.0, gt=0)
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(128, ge=1)
    minibatch_size: int = Field(64, ge=1)
    epochs: int = Field(2, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(5, ge=0)
    clip: float = Field(0.2, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradients: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype in which they go through the frozen weights; bfloat16 is for a CPU that has it"
    )
    eos_penalty: float = 0.0
    epoch_kl_stop: float = Field(0.02, description="nats a token from the sampling policy at which a step's epochs end")
    kl_coef: float = Field(0.1, ge=0)
    kl_target: float = Field(0.0, ge=0, description="nats a completion that an adaptive coefficient aims at; 0 = fixed")
    kl_horizon: float = Field(10_000, gt=0, description="completions over which the coefficient adapts")
    kl_stop: float = Field(0.0, ge=0, description="nats a completion at which the run ends; 0 = never")
    save_every: int = Field(20, ge=1)
    record_every: int = Field(10, ge=1, description="steps between recorded rollouts, of exact KL")

    @model_validator(mode="after")
    def _style_and_target_act(self) -> Self:
        if self.kl_target and not self.kl_coef:
            raise ValueError("kl_coef: 0 stays 0, since kl_target multiplies it; give a start, or no kl_target")
        if self.style and "rubric:style" not in self.reward:
            raise ValueError("style: its patterns count where reward names rubric:style; add it there, with a weight")
        return self


@dataclass(frozen=True)
class Job:
    """What a run stands on before its first step. `state` is its newest checkpoint's, None where it has none."""

    roles: Roles
    stack: Stack
    base_hash: str
    train: PromptBatch
    held_out: PromptBatch
    measure: Measure
    reward: Reward
    sampler: Sampler
    decoding: Decoding
    state: dict[str, Any] | None


def policy_base(config: PolicyConfig, run: RunDir) -> tuple[Backbone, Stack]:
    """The base that a policy may learn on, and what it is made of. UserError where it cannot write what is asked."""
    backbone, under = load_stack(config.model, device=config.device)
    if under.kind != "causal":
        raise UserError(
            f"model {config.model}: a {under.kind}; {config.recipe} needs a causal language model or its adapter"
        )
    if config.gradients != "float32" and backbone.device.type != "cpu":
        raise UserError(f"gradients: {config.gradients} is for a CPU, and this is {backbone.device.type}; leave it out")
    longest_prompt(config, backbone.model)
    note_model(run, "model", config.model, backbone.fingerprint)
    return backbone, under


def prepare(config: PolicyConfig, run: RunDir, roles: Roles, backbone: Backbone, under: Stack) -> Job:
    """Reward, measure, prompts and checkpoint: all of it before training, so that what is not there costs seconds."""
    reward = _reward(config, roles, backbone, under)
    for term in terms(config.reward):
        if term.is_function:
            note_function(run, "reward", term.name)
        elif term.is_model:
            note_model(run, "reward", term.name)
    roles.quicken(merged=True, gradients=getattr(torch, config.gradients))
    base_hash = roles.frozen_hash()
    run.event("roles", **{f"{role}_bytes": size for role, size in roles.bytes_per_role().items()})
    tokenizer, longest = roles.tokenizer, longest_prompt(config, roles.model)
    train = prompt_batch(run, config, config.train_data, tokenizer, longest)
    held_out = prompt_batch(run, config, config.eval_data, tokenizer, longest, config.eval_prompts)
    measure = TASKS[config.task].measure(run, config)
    note_leak(run, config.eval_data, train.records, held_out.records)
    sampler = Sampler(roles.twin, tokenizer)
    decoding = Decoding(config.max_new_tokens, config.temperature)
    checkpoint = resume_point(run)
    state = _read_state(checkpoint) if checkpoint else None
    if state is None:
        say_measures(run, "scores answers of the model as it is; then come the steps")
        measured = of_first(lambda: _normalised(reward, sampler, train, decoding, config.seed).state())
        reward = reward.with_state(measured)
        with all_or_none():
            _score_two(reward, sampler, held_out, decoding, config.seed)
    else:
        reward = reward.with_state(state["reward"])
    return Job(roles, under, base_hash, train, held_out, measure, reward, sampler, decoding, state)


def train(config: PolicyConfig, run: RunDir, job: Job, trainer: PolicyTrainer[Any]) -> tuple[str | None, float | None]:
    """The steps that are left, logged and saved. Returns why they ended early (or None), and their median seconds, None
    where none was left."""
    if job.state is not None:
        trainer.load_state_dict(job.state["trainer"])
    reason: str | None = job.state["reason"] if job.state else None
    seconds: list[float] = []
    flat = False
    progress = Progress(config.steps)
    while trainer.steps_done < config.steps and reason is None:
        prompts = _batch(job.train, trainer.steps_done, config)
        try:
            rollout, stats, token_tensors = trainer.step(prompts)
        except LabError:  # a broken invariant is in the log, and so in summary.json, before the run stops
            run.log(trainer.first.metrics() if trainer.first else {}, trainer.steps_done)
            raise
        step = trainer.steps_done
        run.log(stats, step)
        seconds.append(stats["time/step_s"])
        flat = flat or _warned_of_flat(run, rollout, step)
        # k1, which the controller and kl_stop see too; below 0 by chance. z: what rounds to 0 has no sign.
        progress.show(step, f"reward {stats['reward/mean']:.2f}  KL estimate {stats['kl/reference']:z.2f}")
        if config.kl_stop and stats["kl/reference"] > config.kl_stop:
            reason = f"kl/reference {stats['kl/reference']:.2f} passed kl_stop {config.kl_stop} at step {step}"
        if rollout.exact_kl is not None or reason or step == config.steps:  # looked at closely, or the last one
            critic = {} if job.roles.critic == "none" else {"value": rollout.values}
            run.append_rollouts(_records(rollout, critic | token_tensors, job.sampler, step))
        signum = ranks.agreed(run.stop_requested)
        if signum or reason or step % config.save_every == 0 or step == config.steps:
            _write_state(run, step, {"trainer": trainer.state_dict(), "reward": job.reward.state(), "reason": reason})
        if signum:
            raise Interrupted(signum)
    return reason, statistics.median(seconds) if seconds else None


def finish(
    config: PolicyConfig, run: RunDir, job: Job, trainer: PolicyTrainer[Any], reason: str | None, step_s: float | None
) -> dict[str, Any]:
    """Save the adapter, evaluate both sides on held-out prompts by measure and reward, write samples and summary."""
    roles = job.roles
    if roles.frozen_hash() != job.base_hash:
        raise LabError("the frozen base changed during training; its adapter was not saved")
    save_adapter(roles.model, POLICY, run.path / "adapter", policy_stack(config, job.stack, roles.tokenizer))
    sides = before_after(run, roles, job.held_out, job.measure, config.max_new_tokens, config.seed, job.reward)
    metrics = sides.metrics | (trainer.first.metrics() if trainer.first is not None else {})
    artifacts = {"adapter": "adapter", "samples": "samples.jsonl", "rollouts": "rollouts.jsonl"}
    return run.finish(metrics, sides.baseline, sides.intervals, artifacts, step_s, reason=reason)


def sizes(
    config: PolicyConfig, roles_on: Callable[[Backbone, Stack], Roles], per_prompt: int = 1
) -> dict[str, Any]:
    """What `--dry-run` prints: sizes of the job, nothing trained. `per_prompt`: completions of a prompt in a step.

    UserError where the run would refuse its model, its reward or its training data.
    """
    backbone, under = load_stack(config.model, device="cpu")
    longest = longest_prompt(config, backbone.model)
    roles = roles_on(backbone, under)
    _reward(config.with_(device="cpu"), roles, backbone, under)
    prompts = load_records(config.train_data, "prompts", seed=config.seed).records
    if config.prompt_tokens == WHOLE:
        lengths = map(len, encode([record.prompt for record in prompts], roles.tokenizer))
        fitting = [length for length in lengths if length <= longest]
    else:
        fitting = [config.prompt_tokens[1]] * len(prompts)
    completions = config.prompts_per_step * per_prompt
    device, logits = pick_device(config.device), config.max_new_tokens * backbone.model.config.vocab_size
    length = max(fitting, default=1) + config.max_new_tokens
    rows = min(completions, rows_per_pass(device, length, logits=logits))
    return {
        "base": under.base,
        "device": str(device),
        "bytes": roles.bytes_per_role(),
        "trained parameters": sum(p.numel() for p in (roles.policy_parameters() | roles.critic_parameters()).values()),
        "prompts": len(fitting),
        "rollouts": config.steps * completions,
        "tokens sampled": config.steps * completions * config.max_new_tokens,
        "bytes of one pass's logits": rows * logits * 4,
    }


def controller(config: PolicyConfig) -> FixedKL | AdaptiveKL:
    """The KL controller that the config asks for."""
    if config.kl_target:
        return AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
    return FixedKL(config.kl_coef)


def settings_of(kind: type[Settings], config: PolicyConfig, job: Job) -> Settings:
    """The update's settings: every key that bears the name of one, and what follows from model and device."""
    shared = kind.__dataclass_fields__.keys() & type(config).model_fields.keys()
    usual = 0 < config.prompt_tokens[1] <= SHORT and config.temperature == 1.0
    tiny_on_cpu = usual and config.model == "tiny-gpt2" and job.roles.device.type == "cpu"
    limit = first_ratio_limit(job.roles.precision, tiny_on_cpu=tiny_on_cpu)
    return kind(total_steps=config.steps, ratio_limit=limit, **{name: getattr(config, name) for name in shared})


def _reward(config: PolicyConfig, roles: Roles, backbone: Backbone, under: Stack) -> Reward:
    """The reward that the config names; a reward model may join the policy's base."""
    adapters = [term.name for term in terms(config.reward) if term.is_model]
    if config.judge:
        judge = resolve(config.judge).path.resolve()
        if any(resolve(name).path.resolve() == judge for name in adapters):
            raise UserError(f"judge: {config.judge} is the reward too; an independent judge is another classifier")
        if (kind := kind_of(config.judge)) != "classifier":
            raise UserError(f"judge: {config.judge} is of kind {kind}, not a classifier; for example imdb-judge")
    classifier = next((name for name in adapters if kind_of(name) != "reward"), None)
    if classifier and not config.want:
        idle = "want" in TASKS[config.task].idle
        remedy = f"task {config.task} has none" if idle else "give want=positive or want=negative"
        raise UserError(f"reward: {classifier} is a classifier, which looks for the class that `want` names; {remedy}")
    if config.want and not (classifier or config.judge):
        raise UserError("want: neither the reward nor a judge looks for a sentiment; leave it out")
    ground = replace(backbone, model=roles.model), stack_over(config.model, under, roles.tokenizer)
    return reward_of(config.reward, config.want, config.style, config.device, ground)


def _normalised(reward: Reward, sampler: Sampler, train: PromptBatch, decoding: Decoding, seed: int) -> Reward:
    """Gain and bias from completions of the SFT model, which the fresh policy still equals."""
    rows = range(min(NORMALISE_ON, len(train.texts)))
    some = train.take(rows)
    samples = sampler.sample(some.token_ids, [seed + row for row in rows], decoding)
    return reward.normalise(some.texts, sampler.texts(samples), some.records)


def _score_two(reward: Reward, sampler: Sampler, held_out: PromptBatch, decoding: Decoding, seed: int) -> None:
    """A reward that fails on evaluation prompts, as one that asks for a label they lack, fails before the training.

    Two answers, to the same prompt where there is one: a single number for all would pass for that of one answer.
    """
    some = held_out.take([0, len(held_out.texts) - 1])
    completions = sampler.texts(sampler.sample(some.token_ids, [seed, seed], decoding))
    reward(some.texts, completions, some.records)


def _batch(prompts: PromptBatch, step: int, config: PolicyConfig) -> PromptBatch:
    """The prompts of a step: a function of seed and step alone, so the data cursor is the step number.

    Runs through a fresh permutation of all prompts before any repeats.
    """
    total, size = len(prompts.texts), config.prompts_per_step
    rows: list[int] = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, total)
        if not rows or offset == 0:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + epoch))
        rows.append(int(order[offset]))
    return prompts.take(rows)


def _warned_of_flat(run: RunDir, rollout: Rollout, step: int) -> bool:
    """Whether all completions of the step got one and the same reward, which is then an event and a warning."""
    low, high = float(rollout.scores.min()), float(rollout.scores.max())
    flat = low == high and len(rollout.completions) > 1
    if flat:
        run.event("reward_flat", step=step, reward=low)
        say(f"step {step}: the reward of all {len(rollout.completions)} completions is {low:g}: no difference to learn "
            f"from; look at {run.path / 'rollouts.jsonl'}, and at the reward")
    return flat


def _records(rollout: Rollout, tensors: dict[str, torch.Tensor], sampler: Sampler, step: int) -> list[dict[str, Any]]:
    """The first rows of a rollout, token by token, for the inspector; `tensors` (B, C) are further columns."""
    columns = {
        "logprob": rollout.logprobs,
        "ref_logprob": rollout.ref_logprobs,
        "kl": rollout.logprobs - rollout.ref_logprobs,
        **tensors,
    }
    rows = []
    for i in range(min(RECORDED_ROWS, len(rollout.completions))):
        length = int(rollout.completion_mask[i].sum())
        numbers = {name: values[i, :length].tolist() for name, values in columns.items()}
        texts = [sampler.tokenizer.decode([t]) for t in rollout.completion_ids[i, :length].tolist()]
        tokens = [
            {"token": text, **{name: round(values[t], 6) for name, values in numbers.items()}}
            for t, text in enumerate(texts)
        ]
        rows.append(
            {
                "step": step,
                "prompt_id": rollout.prompts.records[i].id,
                "prompt": rollout.prompts.texts[i],
                "completion": rollout.completions[i],
                "score": float(rollout.scores[i]),
                "score_parts": {name: float(part[i]) for name, part in rollout.score_parts.items()},
                "tokens": tokens,
            }
        )
    return rows


def _write_state(run: RunDir, step: int, state: dict[str, Any]) -> None:
    if ranks.rank():
        return
    with run.checkpoints.stage(step) as folder:
        torch.save(state, folder / "state.pt")


def _read_state(folder: Path) -> dict[str, Any]:
    """weights_only: a checkpoint holds tensors and plain numbers, and nothing else is ever unpickled."""
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    return state
