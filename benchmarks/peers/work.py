"""What both sides of a benchmark of RL share: the job, its model and reward, and how its steps are asked for.

A side is a process. It reads the job as a line of JSON, builds what it trains and answers a line; from then on each
line that it reads asks for a step, and is answered with that step's seconds and the most memory in use meanwhile.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

TINY = Path(__file__).resolve().parents[2] / "src" / "peftlab" / "models" / "bundled" / "tiny-gpt2"
SENTENCE = "This movie was one of the strangest films that I have ever seen in a theater, and I cannot say why it is so"
KL_COEF, LR, RANK, ALPHA = 0.05, 1e-5, 16, 32
SAMPLES = 4  # completions of a prompt, of RLOO and GRPO
PASS = 64  # completions of the peer's passes with gradients
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LLAMA: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
         "tie_word_embeddings": True}


@dataclass(frozen=True)
class Job:
    """A step: `batch` completions of exactly `tokens` tokens, on prompts of `prompt` tokens, `epochs` over them.

    `algorithm`: ppo, rloo or grpo. `reward`: "function", of Python and cheap, or "model", a reward model of each
    side's own kind. `pass_tokens`: of our passes, 0 for as many as suit the device; `gradients`: our key of that name.
    """

    algorithm: str
    device: str
    model: str
    prompt: int
    batch: int
    tokens: int
    epochs: int = 1
    reward: str = "function"
    pass_tokens: int = 0
    gradients: str = "float32"


def tokenizer_of(job: Job) -> Any:
    """tiny-gpt2's for every model: it says which token pads and ends, and spells out those of 8,192 that it knows."""
    return AutoTokenizer.from_pretrained(TINY)


def prompt_of(job: Job, tokenizer: Any) -> tuple[str, list[int]]:
    """A text of exactly `prompt` tokens, and they."""
    ids = tokenizer(SENTENCE).input_ids[: job.prompt]
    text = tokenizer.decode(ids)
    if len(ids) != job.prompt or tokenizer(text).input_ids != ids:
        raise SystemExit(f"the sentence of the benchmarks has no opening of {job.prompt} tokens")
    return text, ids


def policy_of(job: Job, dtype: torch.dtype = torch.float32) -> Any:
    """The base model on the CPU, with the same weights on each side: tiny-gpt2's, or random ones."""
    if job.model == "tiny-gpt2":
        return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype)
    return random_model(job.model, dtype)


def random_model(architecture: str, dtype: torch.dtype) -> Any:
    """GPT-2 124M (gpt2-arch) or SmolLM2 135M (smollm2-arch) with random weights, the same each time, on the CPU."""
    torch.manual_seed(0)
    config: Any = GPT2Config(**NO_DROPOUT, **IDS) if architecture == "gpt2-arch" else LlamaConfig(**LLAMA, **IDS)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def reward_of(completions: Sequence[str]) -> list[float]:
    """A number for each text."""
    return [float(len(text) % 7) for text in completions]


def trl_arguments(job: Job, folder: str) -> dict[str, Any]:
    """What every trainer of TRL is told: one optimizer step on the whole batch, in passes that fit."""
    cuda, rows = job.device == "cuda", min(PASS, job.batch)
    return {
        "output_dir": folder, "per_device_train_batch_size": rows, "gradient_accumulation_steps": job.batch // rows,
        "learning_rate": LR, "bf16": cuda, "use_cpu": not cuda, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10**6,
    }


def trl_lora(policy: Any) -> Any:
    """The LoRA of ours as PEFT names it."""
    from peft import LoraConfig

    gpt2 = policy.config.model_type == "gpt2"
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", fan_in_fan_out=gpt2,
                      task_type="CAUSAL_LM")


def parameter_bytes(parameters: Any) -> int:
    """Bytes of distinct tensors."""
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in parameters}.values())


class Answers:
    """The lines of a side. What else it prints goes to stderr."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.job = Job(**json.loads(sys.stdin.readline()))
        self.begun = time.perf_counter()

    def __call__(self, **facts: Any) -> None:
        """A step has ended, or at first the building: answers, waits until a step is asked for, and begins it."""
        cuda = self.job.device == "cuda"
        if cuda:
            torch.cuda.synchronize()
        took = {"seconds": time.perf_counter() - self.begun, "gb": peak_bytes(cuda) / 1e9}
        print(json.dumps(took | facts), file=self.out, flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        _reset_peak(cuda)
        self.begun = time.perf_counter()


def serve(build: Callable[[Job, Answers], None]) -> None:
    """Run a side: `build` makes what the job asks for, and calls the answers at the end of every step."""
    answers = Answers()
    build(answers.job, answers)


def peak_bytes(cuda: bool) -> int:
    """The most that tensors took on the GPU; on a CPU, the most that the process had resident."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak(cuda: bool) -> None:
    """The next step's peak is its own; a CPU's stays that of all steps so far where the kernel does not reset it."""
    reset = Path("/proc/self/clear_refs")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif reset.exists():
        reset.write_text("5")
