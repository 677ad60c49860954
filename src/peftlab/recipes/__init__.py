"""Each verb is a module with CONFIG, `run(config, run)` and `plan(config)`; they load when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

RECIPES = ("pretrain", "sft", "classify", "summarize", "reward", "ppo", "rloo", "dpo")


def load(verb: str) -> ModuleType:
    """The recipe module of a verb."""
    return importlib.import_module(f"{__name__}.{verb}")
