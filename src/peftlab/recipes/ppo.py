"""PPO on a LoRA policy, with a critic: steer what a language model says. What for is the task's to say: `tasks/`.

Read `run` top to bottom: it is the whole job, in verbs of `rl_common.py`. The algorithm is `rl/ppo.py`, `step`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field

from ..errors import UserError
from ..models.backbone import Backbone
from ..models.reward_model import critic_start
from ..models.roles import Roles
from ..models.stacks import Stack, kind_of, stack_over
from ..rewards.spec import terms
from ..rl.ppo import PPOSettings, PPOTrainer
from ..runs.rundir import RunDir
from .common import seed_everything
from .rl_common import PolicyConfig, controller, finish, policy_base, prepare, settings_of, sizes, train


class PPOConfig(PolicyConfig):
    """Every key of `peftlab ppo`: those of `PolicyConfig`, and the critic's."""

    recipe: Literal["ppo"] = "ppo"
    critic: Literal["shared", "adapter", "reward"] = Field(
        "shared", description="a head on the policy's states, a LoRA of its own, or one that starts as the reward model"
    )
    critic_lr: float = Field(1e-3, gt=0)
    critic_warmup: int = Field(0, ge=0, description="first steps that train the critic alone")
    lam: float = Field(0.95, ge=0, le=1)
    value_clip: float = Field(0.2, gt=0)
    value_coef: float = Field(0.1, ge=0)


CONFIG = PPOConfig


def run(config: PPOConfig, run: RunDir) -> dict[str, Any]:
    """Train, evaluate before and after on held-out prompts, and write the run directory."""
    with run.session():
        if run.finished:
            return run.summary or {}
        seed_everything(config.seed)
        backbone, under = policy_base(config, run)
        roles = _roles(config, backbone, under)
        job = prepare(config, run, roles, backbone, under)
        settings = settings_of(PPOSettings, config, job)
        trainer = PPOTrainer(
            roles, job.sampler, job.reward, controller(config), settings, job.decoding, config.seed
        )
        with run.stepping():
            reason, step_s = train(config, run, job, trainer)
        return finish(config, run, job, trainer, reason, step_s)


def plan(config: PPOConfig) -> dict[str, Any]:
    """What `--dry-run` prints: sizes of the job, nothing trained."""
    return sizes(config, partial(_roles, config))


def _roles(config: PPOConfig, backbone: Backbone, under: Stack) -> Roles:
    """The roles on a base. UserError where the critic is to start as a reward model, and the reward names none."""
    if config.critic != "reward":
        return Roles(backbone, config.lora, config.critic)
    models = [term for term in terms(config.reward) if term.is_model and kind_of(term.name) == "reward"]
    if len(models) != 1:
        raise UserError(
            f"critic: reward starts it as the reward model that `reward` names, and that names {len(models)}; "
            "name one there, or give critic=adapter"
        )
    (model,) = models
    ground = backbone, stack_over(config.model, under, backbone.tokenizer)
    return Roles(backbone, config.lora, "adapter", critic_start(model.name, ground, model.weight))
