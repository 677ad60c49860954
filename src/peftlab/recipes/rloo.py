"""RLOO on a LoRA policy: steer a language model by several answers to each prompt, without a critic; tasks as `ppo`.

Read `run` top to bottom: it is the whole job, in verbs of `rl_common.py`. The algorithm is `rl/rloo.py`, `step`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..models.roles import Roles
from ..rl.rloo import RLOOSettings, RLOOTrainer
from ..runs.rundir import RunDir
from .common import seed_everything
from .rl_common import PolicyConfig, controller, finish, policy_base, prepare, settings_of, sizes, train


class RLOOConfig(PolicyConfig):
    """Every key of `peftlab rloo`: those of `PolicyConfig`, and how a prompt's answers are compared."""

    recipe: Literal["rloo"] = "rloo"
    prompts_per_step: int = Field(32, ge=1, description="each is answered samples_per_prompt times")
    samples_per_prompt: int = Field(4, ge=2, description="completions of a prompt: each one's baseline is the others")
    minibatch_size: int = Field(0, ge=0, description="completions of an optimizer step; 0 = all: one on-policy step")
    epochs: int = Field(1, ge=1)
    scale_by_std: bool = Field(False, description="divide advantages by their prompt's standard deviation (GRPO)")
    length_normaliser: Literal["fixed", "sequence"] = Field(
        "fixed", description="a completion's loss is over max_new_tokens (fixed), or over its own length, as in GRPO"
    )


CONFIG = RLOOConfig


def run(config: RLOOConfig, run: RunDir) -> dict[str, Any]:
    """Train, evaluate before and after on held-out prompts, and write the run directory."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        backbone, under = policy_base(config, run)
        roles = Roles(backbone, config.lora, critic="none")
        job = prepare(config, run, roles, backbone, under)
        settings = settings_of(RLOOSettings, config, job)
        trainer = RLOOTrainer(
            roles, job.sampler, job.reward, controller(config), settings, job.decoding, config.seed
        )
        with run.stepping():
            reason, step_s = train(config, run, job, trainer)
        return finish(config, run, job, trainer, reason, step_s)


def plan(config: RLOOConfig) -> dict[str, Any]:
    """What `--dry-run` prints: sizes of the job, nothing trained."""
    return sizes(config, lambda backbone, _: Roles(backbone, config.lora, critic="none"), config.samples_per_prompt)
