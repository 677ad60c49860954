"""Our side of the benchmarks of RL: a step of the lab's trainers, in the lab's default dtype of the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from work import ALPHA, KL_COEF, LR, RANK, SAMPLES, Answers, Job, policy_of, prompt_of, reward_of, serve, tokenizer_of

from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone
from peftlab.models.freed_memory import keep_freed_memory
from peftlab.models.quick_layers import quicken_layers
from peftlab.models.reward_model import RewardModel, RewardNet
from peftlab.models.roles import Roles
from peftlab.recipes.several import joined
from peftlab.rl.control import FixedKL
from peftlab.rl.ppo import PPOSettings, PPOTrainer
from peftlab.rl.rloo import RLOOSettings, RLOOTrainer
from peftlab.rl.rollout import PromptBatch, ScoreFunction
from peftlab.rl.trainer import PolicyTrainer
from peftlab.sampling.sampler import Decoding, Sampler

LORA = Lora(r=RANK, alpha=ALPHA)


def roles_of(job: Job) -> tuple[Roles, ScoreFunction]:
    """The roles on one base, the reward model among them where the job asks for one."""
    tokenizer = tokenizer_of(job)
    keep_freed_memory()
    model = quicken_layers(policy_of(job)).to(job.device).requires_grad_(False).eval()
    backbone = Backbone(job.model, model, tokenizer, "")
    roles = Roles(backbone, LORA, "shared" if job.algorithm == "ppo" else "none")
    roles.quicken(merged=True, gradients=getattr(torch, job.gradients))
    if job.reward == "function":
        return roles, lambda prompts, completions, records: (torch.tensor(reward_of(completions)), {})
    net = RewardNet.fresh(replace(backbone, model=roles.model), LORA).requires_grad_(False)
    for parameter in (roles.policy_parameters() | roles.critic_parameters()).values():
        parameter.requires_grad_(True)
    judge = RewardModel("reward", net, tokenizer, job.prompt + job.tokens + 1)
    return roles, lambda prompts, completions, records: (judge.scores(prompts, completions), {})


def trainer_of(job: Job) -> PolicyTrainer[Any]:
    """PPO or RLOO, one optimizer step an epoch, and no epoch or limit that would cut a step short."""
    roles, reward = roles_of(job)
    sampler = Sampler(roles.twin, roles.tokenizer)
    sampler.eos_id = None  # every completion has the same length, as the peer's
    common: dict[str, Any] = {"lr": LR, "minibatch_size": 0, "pass_tokens": job.pass_tokens, "epochs": job.epochs,
              "epoch_kl_stop": float("inf"), "ratio_limit": float("inf"), "record_every": 10**9, "total_steps": 10**6}
    given = roles, sampler, reward, FixedKL(KL_COEF)
    if job.algorithm == "ppo":
        return PPOTrainer(*given, PPOSettings(**common), Decoding(job.tokens))
    return RLOOTrainer(*given, RLOOSettings(samples_per_prompt=SAMPLES, **common), Decoding(job.tokens))


def run(job: Job, answers: Answers) -> None:
    with joined(job.device):
        train(job, answers)


def train(job: Job, answers: Answers) -> None:
    """Builds, and makes a step whenever one is asked for."""
    torch.manual_seed(0)  # all processes begin with the same adapter
    trainer = trainer_of(job)
    text, ids = prompt_of(job, trainer.roles.tokenizer)
    count = job.batch if job.algorithm == "ppo" else job.batch // SAMPLES
    prompts = PromptBatch([ids] * count, [text] * count, [None] * count)
    held = {"bytes": trainer.roles.bytes_per_role()} if job.reward == "model" else {}
    rough = f", gradients {job.gradients}" if job.gradients != "float32" else ""
    answers(dtype=dtype_of(trainer.roles) + rough, **held)
    while True:
        rollout, stats, _ = trainer.step(prompts)
        if int(rollout.completion_mask.sum()) != job.batch * job.tokens:
            raise SystemExit("our completions are not as long as the peer's")
        first = trainer.first.ratio_error if trainer.first else None
        answers(rollout_s=stats["time/rollout_s"], ratio_error=first)


def dtype_of(roles: Roles) -> str:
    """The dtype of the policy's matrix products."""
    dtype = str(next(roles.model.parameters()).dtype).removeprefix("torch.")
    tf32 = dtype == "float32" and roles.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else dtype


if __name__ == "__main__":
    serve(run)
