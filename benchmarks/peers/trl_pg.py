"""The peer's side: RLOO or GRPO of TRL 1.16, a policy-gradient step on four completions a prompt; on a GPU in bf16."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
import trl
import work
from transformers import TrainerCallback
from work import Answers, Job

CLASSES = {"rloo": (trl.RLOOConfig, trl.RLOOTrainer), "grpo": (trl.GRPOConfig, trl.GRPOTrainer)}


class StepEnds(TrainerCallback):
    """Hands the end of every step to the answers."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.answers()


def run(job: Job, answers: Answers) -> None:
    tokenizer = work.tokenizer_of(job)
    policy = work.policy_of(job, torch.bfloat16 if job.device == "cuda" else torch.float32)
    text, _ = work.prompt_of(job, tokenizer)
    config, kind = CLASSES[job.algorithm]
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            **work.trl_arguments(job, folder), num_generations=work.SAMPLES, max_completion_length=job.tokens,
            generation_kwargs={"min_new_tokens": job.tokens}, max_steps=10**6, beta=work.KL_COEF,
        )
        trainer = kind(
            model=policy, args=arguments, processing_class=tokenizer, peft_config=work.trl_lora(policy),
            reward_funcs=lambda completions, **_: work.reward_of(completions), callbacks=[StepEnds(answers)],
            train_dataset=datasets.Dataset.from_dict({"prompt": [text] * 4096}),
        )
        answers(name=f"TRL {trl.__version__} {job.algorithm.upper()}" + ", bf16" * arguments.bf16)
        trainer.train()


if __name__ == "__main__":
    work.serve(run)
