"""A run of ppo, rloo or dpo as it is read again: its policy at any checkpoint, its held-out prompts, its measure."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import load_config
from ..errors import UserError
from ..evaluation.policy import Measure
from ..models.adapter_files import check_tensors, load_stack, read_weights
from ..models.backbone import Backbone
from ..models.roles import POLICY, Roles
from ..models.stacks import PEFT_WEIGHTS, Stack, read_stack, stack_over
from ..rewards.parts import Reward
from ..rewards.spec import reward_of
from ..rl.rollout import PromptBatch
from ..runs.checkpoint import verify_manifest
from ..runs.rundir import RunDir
from ..runs.summary import read_environment
from ..training.trainer import WEIGHTS
from . import load
from .before_after import longest_prompt, prompt_batch
from .common import note_model
from .rl_common import PolicyConfig
from .tasks import TASKS
from .tasks.config import TaskConfig

RECIPES = ("ppo", "rloo", "dpo")


class ReadRun(RunDir):
    """A run that is only read. Data and models must be those that it began with; nothing is written."""

    sha256 = ""  # of the data that was read last

    @classmethod
    def at(cls, folder: Path) -> ReadRun:
        """The run in a folder that `recipe_of` knows, called by its folder: a copy bears the name of the first."""
        return cls(folder, str(folder), str(recipe_of(folder)), resumed=True)

    def config_on(self, device: str) -> TaskConfig:
        """Its config, on a device of this machine."""
        config: TaskConfig = load_config(load(self.recipe).CONFIG, str(self.path / "config.toml"), [f"device={device}"])
        return config

    @cached_property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole."""
        return [step for step in self.checkpoints.steps() if not verify_manifest(self.checkpoints.path(step))]

    @property
    def has_adapter(self) -> bool:
        """Whether the adapter of the run's end is there."""
        return (self.path / "adapter" / "adapter_config.json").is_file()

    def event(self, kind: str, **fields: Any) -> None:
        """Nothing happens to a run that is read."""

    def record_data(self, name: str, sha256: str, rows: int) -> None:
        """UserError where the run noted other data under this name."""
        self.sha256 = sha256
        self._same("data", name, sha256, f"data {name!r}")

    def record_model(self, what: str, sha256: str) -> None:
        """UserError where the run noted another model under this key."""
        self._same("models", what, sha256, what)

    def _same(self, table: str, name: str, sha256: str, words: str) -> None:
        known = read_environment(self.path).get(table, {}).get(name)
        if known and known["sha256"] != sha256:
            raise UserError(
                f"{words} is not what run {self.name!r} learned with (sha256 {known['sha256'][:12]} then, "
                f"{sha256[:12]} now); restore it"
            )


@dataclass(frozen=True)
class PolicyRun:
    """A run that is read, and its roles, whose policy has no weights of the run's before `load_policy`."""

    run: ReadRun
    config: TaskConfig
    roles: Roles
    ground: tuple[Backbone, Stack]

    @classmethod
    def open(cls, folder: Path, device: str) -> PolicyRun:
        """Load what the policy stands on. UserError where it is not what the run began with."""
        run = ReadRun.at(folder)
        config = run.config_on(device)
        backbone, under = load_stack(config.model, device=device)
        note_model(run, "model", config.model, backbone.fingerprint)
        roles = Roles(backbone, config.lora, "none")
        if isinstance(config, PolicyConfig):  # ppo or rloo, whose figures came from these kernels
            roles.quicken(merged=True)
        ground = replace(backbone, model=roles.model), stack_over(config.model, under, roles.tokenizer)
        return cls(run, config, roles, ground)

    def load_policy(self, step: int | None) -> None:
        """Give the policy the weights of a checkpoint, or (None) those of the run's end. UserError without them."""
        known, name = ", ".join(map(str, self.run.steps)), self.run.name
        if step is None and not self.run.has_adapter:
            other = f"let it end, or give --checkpoint STEP, of {known}" if known else "nor any checkpoint; let it end"
            raise UserError(f"run {name} has not ended, so it has no adapter; {other}")
        if step is not None and step not in self.run.steps:
            there = f"there are {known}" if known else "there is none"
            raise UserError(f"--checkpoint {step}: run {name} has no whole one of that step; {there}")
        if step is None:
            self._load_adapter()
        else:
            self.roles.load_state(self._checkpoint(step))

    def prompts(self, data: str | None, limit: int | None) -> PromptBatch:
        """The run's held-out prompts, or those of other data; `limit` as in the config where it is None."""
        spec = data or getattr(self.config, self.config.CALLED["test"])
        longest = longest_prompt(self.config, self.roles.model)
        return prompt_batch(
            self.run, self.config, spec, self.roles.tokenizer, longest, limit or self.config.eval_prompts
        )

    def measure(self) -> Measure:
        """What the run's task measures by."""
        return TASKS[self.config.task].measure(self.run, self.config)

    def reward(self) -> Reward | None:
        """What the policy learned from, scaled as it was then; None of dpo, and where no checkpoint tells the scale."""
        if not isinstance(self.config, PolicyConfig) or not self.run.steps:
            return None
        reward = reward_of(self.config.reward, self.config.want, self.config.style, self.config.device, self.ground)
        return reward.with_state(self._state(self.run.steps[-1])["reward"])

    def _load_adapter(self) -> None:
        from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

        folder = self.run.path / "adapter"
        read_stack(folder)  # checks every byte of it
        tensors = read_weights(folder / PEFT_WEIGHTS)
        model = self.roles.model
        check_tensors(
            folder, tensors, get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
        )
        set_peft_model_state_dict(model, tensors, adapter_name=POLICY)
        self.roles.moved()

    def _checkpoint(self, step: int) -> Mapping[str, Tensor]:
        """The policy's parameters by their names in `Roles`; a critic's are left out."""
        if isinstance(self.config, PolicyConfig):
            found = self._state(step)["trainer"]["roles"]
        else:
            saved = load_file(next(self.run.checkpoints.path(step).glob(f"*/{WEIGHTS}")))
            found = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
        own = self.roles.policy_parameters()
        if missing := own.keys() - found.keys():
            raise UserError(f"run {self.run.name}: its checkpoint of step {step} lacks {min(missing)}; restore the run")
        return {name: found[name] for name in own}

    def _state(self, step: int) -> dict[str, Any]:
        file = self.run.checkpoints.path(step) / "state.pt"
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
        return state


def recipe_of(folder: Path) -> str | None:
    """The recipe of the run in a folder, where it trains a policy; else None."""
    try:
        recipe = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")).get("recipe")
    except (OSError, ValueError):
        return None
    return str(recipe) if recipe in RECIPES else None
