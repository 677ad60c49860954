"""A reward is a weighted sum of named parts; every part is logged on its own."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.records import shown
from ..errors import LabError, PeftlabError, UserError, brief, did_you_mean
from ..ops.finite import first_not_finite
from ..runs.names import NAME

# (prompts, completions, records) -> one number per completion, or {part name: numbers}.
RewardFunction = Callable[[Sequence[str], Sequence[str], Sequence[Any]], Any]


@dataclass(frozen=True)
class RewardPart:
    """score = weight * (gain * raw + bias). `normalise` asks `Reward.normalise` to set gain and bias."""

    name: str
    function: RewardFunction
    weight: float = 1.0
    normalise: bool = False
    gain: float = 1.0
    bias: float = 0.0


@dataclass(frozen=True)
class Reward:
    """Scores completions by its parts."""

    parts: tuple[RewardPart, ...]

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total scores (B,) and each part's own (B,), normalised but not weighted. float32 on the CPU.

        Raises LabError where a part returns something that is not one finite number per completion.
        """
        values: dict[str, Tensor] = {}
        total = torch.zeros(len(completions))
        for part in self.parts:
            for name, raw in self._raw(part, prompts, completions, records).items():
                values[name] = part.gain * raw + part.bias
                total += part.weight * values[name]
        return total, values

    def normalise(self, prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> Reward:
        """A reward whose normalised parts have mean 0 and variance 1 on these samples of the SFT model."""
        parts = []
        for part in self.parts:
            if part.normalise:
                (raw,) = self._raw(part, prompts, completions, records).values()
                gain = 1.0 / max(float(raw.std()), 1e-6)
                part = replace(part, gain=gain, bias=-gain * float(raw.mean()))
            parts.append(part)
        return Reward(tuple(parts))

    def state(self) -> dict[str, list[float]]:
        """Gain and bias of each part, for checkpoints."""
        return {part.name: [part.gain, part.bias] for part in self.parts}

    def with_state(self, state: Mapping[str, Sequence[float]]) -> Reward:
        """These parts scaled as `state` tells, in its order: a checkpoint's may have gone by other names."""
        scales = zip(self.parts, state.values(), strict=True)
        return Reward(tuple(replace(part, gain=gain, bias=bias) for part, (gain, bias) in scales))

    @staticmethod
    def _raw(part: RewardPart, prompts: Any, completions: Any, records: Any) -> dict[str, Tensor]:
        given = part.function(prompts, completions, records)
        named = given if isinstance(given, Mapping) else {part.name: given}
        result = {}
        for name, numbers in named.items():
            if not NAME.fullmatch(str(name)):  # it becomes a metric's name
                raise LabError(f"reward part {name!r}: a name is 1 to 64 letters, digits, '.', '_' or '-'")
            try:
                values = torch.as_tensor(numbers, dtype=torch.float32).cpu()
            except (TypeError, ValueError, RuntimeError):
                raise LabError(f"reward part {name}: returned {shown(numbers)}; return a number for each") from None
            if values.shape != (len(completions),):
                raise LabError(
                    f"reward part {name}: {len(completions)} completions, but values of shape {tuple(values.shape)}; "
                    "return a number for each"
                )
            if not torch.isfinite(values).all():
                (row,), value = first_not_finite(values)
                raise LabError(f"reward part {name}: {value} for completion {row}: {completions[row]!r}")
            result[name] = values
        return result


def dotted(file: str) -> str:
    """How Python spells the module in a file, whose path ends in .py or leaves it out; of a file elsewhere its name."""
    path = Path(file.removesuffix(".py"))
    return path.name if path.is_absolute() or ".." in path.parts else ".".join(path.parts)


def user_function(path: str) -> RewardFunction:
    """`module:function`, looked up on the import path and in the working directory. Raises UserError."""
    module_name, _, function_name = path.partition(":")
    if not (module_name and function_name):
        raise UserError(f"reward {path!r}: expected module:function, for example my_rewards:politeness")
    if (spelled := dotted(module_name)) != module_name:
        raise UserError(f"reward {path!r}: write the module as Python imports it, {spelled}:{function_name}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"reward {path!r}: no module {error.name!r} in {Path.cwd()} or installed") from None
    except Exception as error:  # the user's module runs here, and may fail in any way
        raise UserError(f"reward {path!r}: importing it failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, function_name):
        near = did_you_mean(function_name, dir(module))
        raise UserError(f"reward {path!r}: module {module_name} has no {function_name!r}" + (near and f"; {near}"))
    function = getattr(module, function_name)
    if not callable(function):
        raise UserError(f"reward {path!r}: {function_name} is not a function")
    return _told_in_a_line(path, function, getattr(module, "__file__", None))


def _told_in_a_line(path: str, function: RewardFunction, file: str | None) -> RewardFunction:
    """The function; what it raises is a LabError that names its line."""

    def called(*given: Any) -> Any:
        try:
            return function(*given)
        except (PeftlabError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if frame.filename == file]
            if not own and isinstance(error, TypeError):  # it was not even entered
                raise LabError(f"reward {path}: takes (prompts, completions, records); {brief(error)}") from error
            frame = (own or frames)[-1]
            place = f"{Path(frame.filename).name}, line {frame.lineno}"
            raise LabError(f"reward {path}: {place}: {brief(error)}") from error

    return called
