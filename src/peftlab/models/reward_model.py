"""Prompt and answer to a number: LoRA and a scalar head on a causal base, alone or as an ensemble on one base.

The folder of a reward model is an adapter folder of kind "reward": a plain PEFT LoRA with head.safetensors beside it,
or for an ensemble member-0, member-1 ... that hold one each. stack.json keeps how scores are combined and scaled.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..data.collate import collate_tokens
from ..data.tokenize import encode
from ..errors import UserError, with_article
from ..runs.checkpoint import whole_folder
from ..runs.progress import batch_starts
from .adapter_files import check_tensors, load_adapter, load_under, read_weights, write_peft
from .adapters import Lora, activate, adapter_parameters, attach, only
from .backbone import Backbone, at_last, last_states, trunk
from .captured import CAPTURED_TOKENS, CapturedStates, capturable, padded
from .catalog import resolve
from .heads import ScalarHead, reward_head
from .reward_scale import Scale
from .stacks import Stack, read_stack, same_ground, write_stack

HEAD_WEIGHTS = "head.safetensors"


class RewardNet(nn.Module):
    """The LoRAs and heads of M members on one frozen base; one `member` at a time is in use.

    In training the dropout of its LoRA acts, the base's own never: answers of a pair are compared under one network.
    """

    def __init__(self, model: Any, heads: Sequence[ScalarHead]) -> None:
        super().__init__()
        self.model, self.heads = model, nn.ModuleList(heads)
        self.captured: CapturedStates | None = None
        self.to(next(model.parameters()).device).eval()
        self.use(0)

    @classmethod
    def fresh(cls, backbone: Backbone, lora: Lora, members: int = 1, seed: int = 0) -> Self:
        """Each member has its own LoRA, a no-op at first, and its own random head, drawn from seed, seed + 1 ..."""
        model, heads = backbone.model, []
        for member in range(members):
            torch.manual_seed(seed + member)
            model = attach(model, lora, member_name(member), base=backbone.name)
            heads.append(reward_head(model.config.hidden_size))
        return cls(model, heads)

    def use(self, member: int) -> None:
        """Make `forward` this member's."""
        self.member = member
        activate(self.model, member_name(member))

    def learn(self, member: int) -> None:
        """`use`, and its LoRA and head become all that asks for gradients."""
        self.use(member)
        self.captured = None  # training needs the memory
        self.requires_grad_(False)
        for parameter in self.learned(member).values():
            parameter.requires_grad_(True)

    def learned(self, member: int) -> dict[str, nn.Parameter]:
        """LoRA and head of a member, by name."""
        head = self.heads[member].named_parameters(f"heads.{member}")
        return adapter_parameters(self.model, member_name(member)) | dict(head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (B,), read at each row's last real token. Both inputs are (B, T), padded on either side."""
        scores: Tensor = self.heads[self.member](last_states(self.model, input_ids, attention_mask.bool()))
        return scores

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`forward` without a gradient, on a GPU by CUDA graphs where they can hold the base's passes."""
        device = input_ids.device
        if self.captured is None and device.type == "cuda" and capturable(self.model.get_base_model()):
            self.captured = CapturedStates(trunk(self.model), device)
        if self.captured is None or input_ids.numel() > CAPTURED_TOKENS:
            scores: Tensor = self(input_ids, attention_mask)
            return scores
        mask, name = attention_mask.bool(), member_name(self.member)
        states = self.captured(input_ids, *padded(mask), name, partial(only, self.model, name))
        scores = self.heads[self.member](at_last(states, mask))
        return scores

    def train(self, mode: bool = True) -> Self:
        super().train(False)
        for name, module in self.named_modules():
            if mode and ".lora_dropout" in name:
                module.train()
        return self


@dataclass(frozen=True)
class RewardModel:
    """R(prompt, answer). `max_length`: tokens of both; of what is longer, the prompt loses its oldest."""

    name: str
    net: RewardNet
    tokenizer: Any
    max_length: int
    scale: Scale = Scale()

    @classmethod
    def load(cls, name: str, device: str = "auto", ground: tuple[Backbone, Stack] | None = None) -> RewardModel:
        """A reward adapter by folder or run.

        `ground`: a base that is in memory, and the stack of an adapter on it. A reward model of the same ground joins
        it there as one more adapter; any other brings its own. Raises UserError for what is no reward model, and for
        one that is not whole: without its head, of another base, with changed bytes or numbers that are not finite.
        """
        entry = resolve(name)
        stack = read_stack(Path(entry.path)) if entry.kind == "adapter" else None
        if stack is None or stack.kind != "reward":
            what = f"an adapter of kind {stack.kind}" if stack else f"{with_article(entry.kind)} model"
            raise UserError(f"{name}: is {what}, not a reward model; `peftlab reward` trains one")
        folder, length = Path(entry.path), stack.extra.get("max_length")
        if not (isinstance(length, int) and length >= 4):
            raise UserError(f"{name}: stack.json says max_length {length!r}; it is a number of tokens, 4 or more")
        scale = Scale.of(name, stack.extra)
        places = _places(folder, len(scale.members))
        found = [_read_head(place) for place in places]
        base = _joined(stack, ground, len(places)) or load_under(folder, stack, device)
        model = base.model
        for member, place in enumerate(places):
            model = load_adapter(model, place, member_name(member), base.fingerprint)
        heads = [ScalarHead(model.config.hidden_size) for _ in places]
        for head, tensors, place in zip(heads, found, places, strict=True):
            check_tensors(place / HEAD_WEIGHTS, tensors, head.state_dict())
            head.load_state_dict(tensors)
            head.requires_grad_(False)
        return cls(name, RewardNet(model, heads), base.tokenizer, length, scale)

    def save(self, folder: Path, stack: Stack) -> Path:
        """Write every member with its head, and stack.json with what `load` needs; `stack` says what lies under."""
        from safetensors.torch import save_file

        with whole_folder(folder) as whole:
            places = _places(whole, len(self.scale.members))
            for member, place in enumerate(places):
                write_peft(self.net.model, member_name(member), place, stack.base)
                head = {name: value.cpu().contiguous() for name, value in self.net.heads[member].state_dict().items()}
                save_file(head, place / HEAD_WEIGHTS, metadata={"format": "pt"})
            if len(places) > 1:  # what marks an adapter's folder; all members are of one shape
                shutil.copy(places[0] / "adapter_config.json", whole / "adapter_config.json")
            facts = {**stack.extra, "max_length": self.max_length, **self.scale.facts()}
            write_stack(whole, replace(stack, kind="reward", extra=facts))
        return folder

    def token_ids(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[int]]:
        """Prompt, answer, EOS. Texts do not tell whether their EOS was sampled, so each is scored as one that ended:
        an answer has one score, whether a file or a rollout brings it."""
        end, rows = self.tokenizer.eos_token_id, []
        for asked, said in zip(encode(prompts, self.tokenizer), encode(completions, self.tokenizer), strict=True):
            answer = [*said[: self.max_length - 1], end]
            rows.append([*asked[max(0, len(asked) + len(answer) - self.max_length) :], *answer])
        return rows

    @torch.no_grad()
    def logits(self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64) -> Tensor:
        """The members' own outputs (N, M), float32 on the CPU; texts of similar length share a batch."""
        rows = self.token_ids(prompts, completions)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = torch.empty(len(rows), len(self.scale.members))
        device = next(self.net.parameters()).device
        self.net.eval()
        for member in range(found.shape[1]):
            self.net.use(member)
            for start in batch_starts(len(order), batch_size):
                part = order[start : start + batch_size]
                batch = collate_tokens([rows[i] for i in part], self.tokenizer.pad_token_id)
                found[part, member] = self.net.score(**{n: t.to(device) for n, t in batch.items()}).float().cpu()
        return found

    def scores(self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64) -> Tensor:
        """(N,) float32 on the CPU, in the order given; mean 0 and variance 1 over the answers it was trained on."""
        return self.scale.scores(self.logits(prompts, completions, batch_size))


@dataclass(frozen=True)
class CriticStart:
    """What a critic starts as: the LoRA of the adapter in `folder`, and a head that says what the reward pays."""

    folder: Path
    head: ScalarHead


def critic_start(name: str, ground: tuple[Backbone, Stack], weight: float = 1.0) -> CriticStart:
    """The reward model `name`, of an ensemble its first member, with its score times `weight` as the head's value.

    `ground`: the base that the critic reads, and the stack of an adapter on it; UserError for a model of another one.
    """
    folder = Path(resolve(name).path)
    stack = read_stack(folder)
    if not same_ground(stack, ground[1]):
        raise UserError(f"critic: {name} is not of the policy's model; train one on that, or give critic=adapter")
    scale = Scale.of(name, stack.extra)
    place, (gain, bias) = _places(folder, len(scale.members))[0], scale.members[0]
    head, tensors = ScalarHead(ground[0].model.config.hidden_size), _read_head(place)
    check_tensors(place / HEAD_WEIGHTS, tensors, head.state_dict())
    head.load_state_dict(tensors)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(weight * scale.gain * gain)
        head.linear.bias.add_(weight * (scale.gain * bias + scale.bias))
    return CriticStart(place, head)


def member_name(member: int) -> str:
    """The PEFT name of a member's LoRA."""
    return f"member-{member}"


def _joined(stack: Stack, ground: tuple[Backbone, Stack] | None, members: int) -> Backbone | None:
    """The ground, where this model has the same and no other reward model stands on it: PEFT's names are taken then."""
    if ground is None or not same_ground(stack, ground[1]):
        return None
    taken = getattr(ground[0].model, "peft_config", {})
    return None if any(member_name(member) in taken for member in range(members)) else ground[0]


def _places(folder: Path, members: int) -> list[Path]:
    return [folder] if members == 1 else [folder / member_name(member) for member in range(members)]


def _read_head(place: Path) -> dict[str, Tensor]:
    if not (place / HEAD_WEIGHTS).is_file():
        raise UserError(f"adapter {place}: has no {HEAD_WEIGHTS}, and without its head it scores nothing; restore it")
    return read_weights(place / HEAD_WEIGHTS)
