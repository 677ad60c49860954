"""`peftlab serve`: models, adapters, personas and rewards behind OpenAI's API, and a page to talk with them.

A name becomes a model here and nowhere else. Models of one base share it: an adapter adds its delta to the rows that
ask for it, and rows of all of them run in one batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat.voices import Cast
from ..data.records import Message, Prompt
from ..errors import UserError
from ..models.adapter_files import load_stack
from ..models.backbone import parameter_bytes
from ..models.catalog import named
from ..models.mix import Mixer
from ..models.per_row import PerRow
from ..models.personas import persona_files
from ..models.stacks import kind_of
from ..rewards.spec import reward_of, terms
from ..runs.signals import EndSignals
from ..sampling.continuous import Batch
from ..sampling.sampler import Decoding, Sampler
from ..web.api import Api, Scorer, Speaker, api_router
from ..web.app import Programs, create_app
from ..web.log import Log
from ..web.page import page_router
from ..web.serve import Listener, is_local
from ..web.worker import Worker
from .served_preferences import Preferences

DEFAULT = Decoding(max_new_tokens=128)


@dataclass(frozen=True)
class ServeOptions:
    """`key_env`, `key_file`: where the API key is. `max_batch` rows run at a time on a base, `max_queue` more may wait;
    `timeout` seconds a request. `log_texts`: prompts in the log. `prefs`: the file of pairs that the page writes."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_env: str | None = None
    key_file: Path | None = None
    max_batch: int = 32
    max_queue: int = 64
    timeout: float = 120.0
    log_texts: bool = False
    prefs: Path = Path("preferences.jsonl")
    want: str = "positive"
    device: str = "auto"


def serve(names: Sequence[str], options: ServeOptions) -> None:
    """Serve until a signal. Raises UserError for what cannot be served, before anything is loaded where it can."""
    key = api_key(options)
    if not is_local(options.host) and key is None:
        raise UserError(
            f"--host {options.host}: others reach it, so it needs a key: give --api-key-env NAME or --api-key-file FILE"
        )
    for option, value, least in (("--max-batch", options.max_batch, 1), ("--max-queue", options.max_queue, 0)):
        if value < least:
            raise UserError(f"{option} {value}: give {least} or more")
    if not 0 < options.timeout < 1e6:
        raise UserError(f"--timeout {options.timeout}: give seconds, more than 0")
    names = [name if name in persona_files() else named(name) for name in names]
    if len(set(names)) < len(names):
        raise UserError(f"serve: {' '.join(names)}: a name stands there twice")
    preferences = Preferences(options.prefs)
    with contextlib.closing(Listener(options.host, options.port)) as listener:
        shelf = Shelf(options.device, options.max_batch, options.want)
        speakers, scorers = shelf.open(names)
        worker = Worker(list(shelf.batches.values()), options.max_queue)
        api = Api(worker, speakers, scorers, options.timeout)
        app = create_app(
            listener.token,
            listener.port,
            [api_router(api), page_router(api, preferences)],
            Programs(key, anywhere=not listener.local),
            listener.name,
        )
        for line in shelf.report(speakers, scorers):
            print(line)
        needs = "with the key" if key else "no key needed on this machine"
        with contextlib.closing(worker), EndSignals() as signals:
            print(f"API {listener.base}/v1 ({needs})\nopen {listener.url('/')}\nCtrl+C ends", flush=True)
            worker.start()
            with signals.heard(listener.stop):
                listener.run(Log(app, _write, options.log_texts))


def api_key(options: ServeOptions) -> str | None:
    """The key that programs must give; None where none is asked for. UserError where it cannot be one."""
    if options.key_env and options.key_file:
        raise UserError("--api-key-env and --api-key-file: give one of them")
    if options.key_env:
        place, key = f"--api-key-env {options.key_env}", os.environ.get(options.key_env, "")
    elif options.key_file:
        place = f"--api-key-file {options.key_file}"
        try:
            key = options.key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "is no UTF-8 text"
            raise UserError(f"{place}: cannot be read: {why.lower()}") from None
    else:
        return None
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{place}: holds no key; a key is printable ASCII without spaces")
    return key


class Shelf:
    """What is in memory: each base once, a batch on it, and the voices and rewards that were named."""

    def __init__(self, device: str, max_batch: int, want: str) -> None:
        self.device, self.max_batch, self.want = device, max_batch, want
        self.batches: dict[Mixer, Batch] = {}
        self._cast = Cast(device)

    def open(self, names: Sequence[str]) -> tuple[list[Speaker], list[Scorer]]:
        """Everything that is to be served."""
        rewards = [name for name in names if _is_reward(name)]
        return [self.speaker(name) for name in names if name not in rewards], [self.scorer(name) for name in rewards]

    def speaker(self, name: str) -> Speaker:
        """A model, an adapter, or a persona."""
        voice = self._cast.persona(name) if name in persona_files() else self._cast.stack(name)
        assert voice.mixer
        batch = self._batch(voice.mixer)
        blend = batch.base.blend(voice.weights)
        if blend is None:  # no sum of deltas: it gets a merged copy of its own
            (stack,) = voice.weights
            batch, blend = self._batch(Mixer(load_stack(stack, device=self.device)[0], shared=False)), ()
        persona = voice.persona
        decoding = Decoding(**persona.decoding.model_dump()) if persona else DEFAULT
        about = persona.description if persona else ("adapter" if blend else "model") + f" on {batch.base.mixer.name}"

        def render(turns: Sequence[Message]) -> str:
            if persona and persona.system and turns[0].role != "system":
                turns = [Message("system", persona.system), *turns]
            return voice.text(turns)

        return Speaker(name, batch, blend, render, decoding, batch.base.mixer.fingerprint, about)

    def scorer(self, name: str) -> Scorer:
        """A reward model, a classifier, or a line of parts as `reward` has it in a config."""
        reward = reward_of(name, self.want, device=self.device)

        def score(prompts: Sequence[str], completions: Sequence[str]) -> tuple[list[float], Mapping[str, list[float]]]:
            records = [Prompt(str(i), prompt) for i, prompt in enumerate(prompts)]
            total, parts = reward(prompts, completions, records)
            return total.tolist(), {part: values.tolist() for part, values in parts.items()}

        return Scorer(name, score, "a reward")

    def report(self, speakers: Sequence[Speaker], scorers: Sequence[Scorer]) -> Iterator[str]:
        """What is served, and what the bases with their adapters take in memory."""
        for mixer, batch in self.batches.items():
            size = parameter_bytes(mixer.model.parameters()) / 2**20
            here = ", ".join(speaker.name for speaker in speakers if speaker.batch is batch)
            yield f"{here}: on one {mixer.name}, {size:.0f} MiB with all adapters"
        yield from (f"{scorer.name}: scores" for scorer in scorers)

    def _batch(self, mixer: Mixer) -> Batch:
        if mixer not in self.batches:
            self.batches[mixer] = Batch(PerRow(mixer), Sampler(mixer.model, mixer.tokenizer), self.max_batch)
        self.batches[mixer].base.settle()
        return self.batches[mixer]


def _is_reward(name: str) -> bool:
    """Whether a name scores: a classifier, a reward model, or a line of parts."""
    if name in persona_files():
        return False
    if os.path.exists(name) or not set(name) & set("+*:("):
        return kind_of(name) in ("classifier", "reward")
    return bool(terms(name))


def _write(row: dict[str, Any]) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)
