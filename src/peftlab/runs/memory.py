"""Memory that does not suffice, told by the keys of the config that fill it."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from ..errors import LabError

# Key -> what to do with it, the one that costs least first. A job has some of them.
KNOBS = {
    "accumulate": "raise accumulate: the same step in smaller parts",
    "batch_size": "lower batch_size",
    "prompts_per_step": "lower prompts_per_step",
    "minibatch_size": "lower minibatch_size",
    "max_length": "lower max_length",
    "max_new_tokens": "lower max_new_tokens",
}
_WORDS = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def memory_fault(error: BaseException) -> str | None:
    """What a device says of a lack of memory, on one line; None for any other error. No import of torch: by its words.

    torch.OutOfMemoryError names the size asked for and what is free; the CPU's allocator, the bytes.
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _WORDS.search(str(error))):
        text = " ".join(str(error).split()) or "out of memory"
        # The rest is advice on the allocator of torch, for programs of one's own.
        return re.split(r" Of the allocated memory | If reserved but | Including non-PyTorch | Use torch\.mps", text)[0]
    return None


@contextlib.contextmanager
def full_memory(config: Path) -> Iterator[None]:
    """Turns a lack of memory that the block meets into a LabError: what was asked for, and which keys of `config`
    (a run's config.toml) ask for less."""
    try:
        yield
    except Exception as error:
        said = memory_fault(error)
        if said is None:
            raise
        held = tomllib.loads(config.read_text(encoding="utf-8"))
        knobs = {key: remedy for key, remedy in KNOBS.items() if key in held}
        sizes = ", ".join(f"{key}={held[key]}" for key in knobs)
        remedies = ", or ".join(knobs.values()) or "use a smaller model"
        raise LabError(f"out of memory with {sizes or 'this job'}: {said.rstrip('.')}; {remedies}") from error
