"""The peer's side: PPO of TRL 1.12 (trl.experimental.ppo), the last that TRL shipped, set up as its own example is.

A whole model is the critic and trains in full; the reference is the policy without its LoRA. On a GPU bf16 autocast.
"""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import transformers
import trl
import work
from torch import Tensor, nn
from trl.experimental.ppo import PPOConfig, PPOTrainer
from work import Answers, Job


class FunctionAsModel(nn.Module):
    """The Python reward in the clothes of a reward model: TRL reads `score` of the last of its hidden states."""

    base_model_prefix = "ids"

    def __init__(self, job: Job, tokenizer: Any) -> None:
        super().__init__()
        self.prompt, self.tokenizer = job.prompt, tokenizer

    def ids(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[input_ids])

    def score(self, ids: Tensor) -> Tensor:
        texts = self.tokenizer.batch_decode(ids[:, self.prompt :], skip_special_tokens=True)
        scores = torch.tensor(work.reward_of(texts), device=ids.device)
        return scores[:, None, None].expand(*ids.shape, 1)


def scalar_model(policy: Any) -> Any:
    """A random sequence classifier with one output, of the policy's architecture."""
    kind: Any = transformers.GPT2ForSequenceClassification
    if policy.config.model_type == "llama":
        kind = transformers.LlamaForSequenceClassification
    return kind(type(policy.config)(**(policy.config.to_dict() | {"num_labels": 1, "dtype": "float32"})))


def run(job: Job, answers: Answers) -> None:
    tokenizer, policy = work.tokenizer_of(job), work.policy_of(job)
    _, ids = work.prompt_of(job, tokenizer)
    reward = FunctionAsModel(job, tokenizer) if job.reward == "function" else scalar_model(policy)
    rows = datasets.Dataset.from_dict({"input_ids": [ids] * max(4096, job.batch)})
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            **work.trl_arguments(job, folder), num_mini_batches=1, num_ppo_epochs=job.epochs,
            total_episodes=job.batch * 10**6, response_length=job.tokens, temperature=1.0, kl_coef=work.KL_COEF,
            local_rollout_forward_batch_size=job.batch, num_sample_generations=0,
        )
        trainer = PPOTrainer(
            args=arguments, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward,
            value_model=scalar_model(policy), train_dataset=rows, eval_dataset=rows.select([0]),
            peft_config=work.trl_lora(policy),
        )
        trainer.log = lambda *_, **__: answers()  # it is called once, at the end of every step
        held = {"bytes": bytes_per_role(trainer)} if job.reward == "model" else {}
        answers(name=f"TRL {trl.__version__} PPO" + ", bf16 autocast" * arguments.bf16, **held)
        trainer.train()


def bytes_per_role(trainer: Any) -> dict[str, int]:
    """Of what the trainer holds in memory; the reference is the policy's base."""
    policy = dict(trainer.policy_model.named_parameters())
    return {
        "base": work.parameter_bytes(p for name, p in policy.items() if "lora_" not in name),
        "reward": work.parameter_bytes(trainer.reward_model.parameters()),
        "policy": work.parameter_bytes(p for name, p in policy.items() if "lora_" in name),
        "value": work.parameter_bytes(trainer.value_model.parameters()),
        "sampler": 0,
    }


if __name__ == "__main__":
    work.serve(run)
