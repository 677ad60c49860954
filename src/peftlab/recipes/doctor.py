"""Is this machine, and this model with its adapters, fit to train on? Every check has a value and what it is to be."""

from __future__ import annotations

import operator
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import UserError
from ..models.adapter_files import load_stack
from ..models.adapters import Lora, lora_layers
from ..models.roles import POLICY, Roles
from ..ops.logprobs import token_logprobs
from ..rl.rollout import PromptBatch, collect_rollout, first_step
from ..runs.metrics import first_ratio_limit
from ..runs.progress import doing
from ..sampling.sampler import Decoding, Sampler

PROMPTS = ["This film", "I went to see it because", "A", "The best thing about this movie was the"]
BOUNDS = {"<=": operator.le, "<": operator.lt, "==": operator.eq, ">": operator.gt}


@dataclass(frozen=True)
class Check:
    """`ok` says whether `value` stands to `limit` as `bound` says: "<=", "<", "==" or ">"."""

    name: str
    value: float
    bound: str
    limit: float
    ok: bool
    detail: str

    def record(self) -> dict[str, Any]:
        """What other tools read of it."""
        return {name: value for name, value in asdict(self).items() if name != "bound"}


def run_doctor(stack_name: str = "tiny-gpt2", device: str = "auto") -> tuple[dict[str, Any], list[Check]]:
    """Environment, and the checks of a stack with a fresh LoRA policy on it."""
    backbone, stack = load_stack(stack_name, device=device)
    if stack.kind != "causal":
        raise UserError(f"{stack_name}: is a {stack.kind}; doctor checks causal language models and their adapters")
    roles = Roles(backbone, Lora(r=4, alpha=8))
    roles.quicken(merged=True)  # as training does
    doing(f"checks {stack_name}: sampling, weights, a step of training")
    tiny = stack_name == "tiny-gpt2" and roles.device.type == "cpu"
    limit = first_ratio_limit(roles.precision, tiny_on_cpu=tiny)
    checks = [*_rollout_checks(roles, limit), *_model_checks(roles), *_training_checks(roles)]
    return {"model": stack_name, "base": stack.base, **environment(roles)}, checks


def environment(roles: Roles) -> dict[str, Any]:
    """Versions come from the run directory's own collection; here: device, threads, memory per role."""
    from ..runs.environment import package_versions

    return {
        "packages": package_versions(),
        "device": str(roles.device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "ON"),
        "bytes_per_role": roles.bytes_per_role(),
    }


def _rollout_checks(roles: Roles, ratio_limit: float) -> list[Check]:
    sampler, decoding = Sampler(roles.twin, roles.tokenizer), Decoding(max_new_tokens=16)
    ids = [roles.tokenizer(p, add_special_tokens=False)["input_ids"] for p in PROMPTS]
    batch = PromptBatch(ids, PROMPTS, [None] * len(PROMPTS))
    rollout = collect_rollout(
        sampler, roles, lambda p, c, r: (torch.zeros(len(c)), {}), batch, range(len(PROMPTS)), decoding
    )
    first = first_step(roles, rollout, decoding.temperature, ratio_limit)
    checks = [
        _check("invariant/first_kl", first.kl, "==", 0.0, "policy with a fresh LoRA against its reference, nats"),
        _check("invariant/first_ratio_error", first.ratio_error, "<=", ratio_limit,
               "sampled against recomputed log-probs; rounding makes less, a bug more"),
    ]
    width = rollout.completion_ids.shape[1]
    with torch.no_grad():
        padded = token_logprobs(roles.policy(rollout.ids, rollout.mask, width), rollout.completion_ids)
        worst = 0.0
        for row in range(len(PROMPTS)):
            keep = rollout.prompt_mask[row].tolist() + [True] * width
            alone = rollout.ids[row][torch.tensor(keep)].unsqueeze(0)
            mask = rollout.mask[row][torch.tensor(keep)].unsqueeze(0)
            logits = roles.policy(alone, mask, width)
            lone = token_logprobs(logits, rollout.completion_ids[row : row + 1])[0]
            worst = max(worst, float(((lone - padded[row]).abs() * rollout.completion_mask[row]).max()))
    roles.refresh(None)
    copies = dict(roles.twin.named_modules())
    apart = [
        (copies[name].weight - layer.base_layer.weight).abs().max() for name, layer in lora_layers(roles.model).items()
    ]
    return [
        *checks,
        _check("padding/left_pad_error", worst, "<=", 1e-4,
               "log-probs of a padded row against it alone, nats; rounding makes less, wrong positions more"),
        _check("sampler/copy_error", float(torch.stack(apart).max()), "==", 0.0,
               "weights of the sampler's copy of the reference against the base's"),
    ]


def _model_checks(roles: Roles) -> list[Check]:
    model, tokenizer = roles.model, roles.tokenizer
    dropout = sum(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.training)
    finite = sum(int((~torch.isfinite(p)).sum()) for p in model.parameters())
    config = model.get_base_model().config
    eos = tokenizer.eos_token_id
    reachable = eos is not None and 0 <= eos < config.vocab_size
    longest = max(len(tokenizer(p)["input_ids"]) for p in PROMPTS) + 48
    separate = tokenizer.pad_token_id != eos
    return [
        _check("model/active_dropout", float(dropout), "==", 0.0, "sum of dropout rates that act in scoring passes"),
        _check("model/non_finite_weights", float(finite), "==", 0.0, "NaN or infinite entries in base and adapters"),
        _check("tokenizer/eos_reachable", float(reachable), "==", 1.0, f"EOS id {eos} of {config.vocab_size}"),
        _check("tokenizer/size", float(len(tokenizer)), "<=", float(config.vocab_size),
               "token ids within the embedding"),
        _check("tokenizer/pad", float(tokenizer.pad_token_id), "<", float(config.vocab_size),
               "pad differs from EOS" if separate else "pad is EOS: masks go by position, so EOS still trains"),
        _check("context/prompt_fits", float(longest), "<=", float(config.max_position_embeddings),
               "longest check prompt plus 48 new tokens"),
    ]


def _training_checks(roles: Roles) -> list[Check]:
    """One real optimizer step on the policy: it must move the adapter and nothing else."""
    before = roles.frozen_hash()
    parameters = list(roles.policy_parameters().values())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    ids = torch.tensor([roles.tokenizer(PROMPTS[-1])["input_ids"]], device=roles.device)
    logits = roles.policy(ids, torch.ones_like(ids, dtype=torch.bool), ids.shape[1] - 1)
    (-token_logprobs(logits, ids[:, 1:]).mean()).backward()
    missing = sum(p.grad is None for p in parameters)
    optimizer.step()
    roles.moved()
    moved = sum(float(p.detach().abs().sum()) for n, p in roles.policy_parameters().items() if f"lora_B.{POLICY}" in n)
    changed = float(roles.frozen_hash() != before)
    return [
        _check("training/base_changed", changed, "==", 0.0, "sha256 of the frozen tensors before and after a step"),
        _check("training/missing_gradients", float(missing), "==", 0.0, "adapter tensors that got no gradient"),
        _check("training/adapter_moved", moved, ">", 0.0, "sum of |B| after one step"),
    ]


def _check(name: str, value: float, bound: str, limit: float, detail: str) -> Check:
    return Check(name, value, bound, limit, BOUNDS[bound](value, limit), detail)
