"""`peftlab data preferences`: pairs of a policy's own answers to a prompt, the better one by a score.

What is sampled follows from (seed, prompt id, number of the answer) alone, and on which side of the split a prompt
falls from its text alone, whatever policy answered it.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.labels import journal_of
from ..data.prompts import openings
from ..data.records import Prompt
from ..data.sources import load_records
from ..data.tokenize import encode
from ..errors import LabError, UserError
from ..models.backbone import fingerprint, trunk
from ..models.classifier import TextClassifier
from ..models.stacks import kind_of
from ..rewards.parts import Reward, RewardFunction, RewardPart
from ..rewards.rubric import RUBRIC
from ..rewards.sentiment import log_odds
from ..rewards.spec import Term, reward_of, terms
from ..runs.atomic import write_json, write_rows, write_text
from ..sampling.sampler import Decoding, Sampler
from .makers import number_of, sample_texts
from .pairing import Answer, pairs_of, split
from .preferences_card import card, told
from .tools import load_sampler

WANTED = ("positive", "negative", "label")


@dataclass(frozen=True)
class PreferenceOptions:
    """How to build pairs: of `k` answers to each of `limit` prompts (None: all), at most `pairs_per_prompt`, whose
    scores differ by `min_margin` at least. `held_out` is a share of the prompts below 1, or their number."""

    policy: str
    prompts: str
    output: Path
    k: int = 4
    scorer: str = "rubric"
    want: str = "positive"
    weights: tuple[tuple[str, float], ...] = ()
    min_margin: float = 0.1
    pairs_per_prompt: int = 3
    held_out: float = 0.1
    limit: int | None = None
    prompt_tokens: tuple[int, int] | None = None
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 128
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, low in (("k", 2), ("pairs_per_prompt", 1), ("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
            _expect(self, name, getattr(self, name) >= low, f"{low} or more")
        _expect(self, "min_margin", 0 <= self.min_margin < math.inf, "0 or more")
        _expect(self, "temperature", 0 < self.temperature < math.inf, "more than 0; a prompt's answers must differ")
        number = self.held_out < 1 or float(self.held_out).is_integer()
        _expect(self, "held_out", self.held_out >= 0 and number, "a share below 1, or a whole number of prompts")
        _expect(self, "limit", self.limit is None or self.limit >= 1, "1 or more")
        _expect(self, "dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        _expect(self, "want", self.want in WANTED, ", ".join(WANTED))
        low, high = self.prompt_tokens or (1, 1)  # None: whole prompts
        _expect(self, "prompt_tokens", 1 <= low <= high, "SHORTEST,LONGEST, as in 2,8")
        if self.weights and self.scorer != "rubric":
            raise UserError(f"--weight: weighs the parts of the rubric; --scorer is {self.scorer}")
        for name, _ in self.weights:
            _expect(self, "weight", name in RUBRIC, f"PART=NUMBER, of the parts {', '.join(RUBRIC)}", name)
        there = next((place for place in (self.folder, *self.folder.parents) if place.exists()), self.folder)
        if there.exists() and not there.is_dir():  # asked before a model loads
            raise UserError(f"--output {self.output}: {there} is a file; give a folder, or a file that ends in .jsonl")
        if (labels := self._labels()) is not None:
            raise UserError(
                f"--output {self.output}: {labels} holds a person's labels of the pairs there, which would be "
                "overwritten; give another --output, or move pairs and labels away"
            )

    def _labels(self) -> Path | None:
        """A journal of `peftlab label` with choices in it, of pairs that are there; in a folder of ours of any name."""
        pairs = [file for file in map(self.file, ("train", "test")) if file.is_file()]
        ours = pairs and self.output.suffix != ".jsonl"
        journals = sorted(self.folder.glob("*.labels.jsonl")) if ours else map(journal_of, pairs)
        return next((file for file in journals if file.is_file() and file.stat().st_size), None)

    @property
    def folder(self) -> Path:
        """What is written into."""
        return self.output.parent if self.output.suffix == ".jsonl" else self.output

    def file(self, split: str) -> Path:
        """Where a split's rows go."""
        if self.output.suffix != ".jsonl":
            return self.output / f"preferences-{split}.jsonl"
        return self.output if split == "train" else self.output.with_name(f"{self.output.stem}-{split}.jsonl")

    def beside(self, suffix: str) -> Path:
        """The file with this suffix that stands beside the rows and tells of them."""
        whole = self.output if self.output.suffix == ".jsonl" else self.output / "preferences.jsonl"
        return whole.with_suffix(suffix)

    def command(self) -> str:
        """The command that builds the same again."""
        words = ["peftlab", "data", "preferences"]
        for name, value in vars(self).items():
            if name == "weights":
                words += [word for part, weight in value for word in ("--weight", f"{part}={weight}")]
            elif name == "prompt_tokens":
                words += ["--prompt-tokens", "{},{}".format(*value)] if value else []
            elif name != "device" and value is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def _expect(options: PreferenceOptions, name: str, fits: bool, wanted: str, given: object = None) -> None:
    if not fits:
        value = getattr(options, name) if given is None else given
        raise UserError(f"--{name.replace('_', '-')} {value}: give {wanted}")


def weights_of(pairs: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """PART=NUMBER as typed on the command line. Raises UserError."""
    weights = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise UserError(f"--weight {pair}: expected PART=NUMBER, for example evidence=2")
    return tuple(weights.items())


def band(typed: str | None) -> tuple[int, int] | None:
    """LOW,HIGH as typed on the command line. Raises UserError."""
    if typed is None:
        return None
    low, _, high = typed.partition(",")
    if not (low.strip().isdecimal() and high.strip().isdecimal()):
        raise UserError(f"--prompt-tokens {typed}: expected LOW,HIGH, for example 2,8")
    return int(low), int(high)


def build_preferences(options: PreferenceOptions) -> dict[str, Any]:
    """Sample, score, pair and split; write the rows of each split, the summary and the card. Returns the summary."""
    begun = time.monotonic()
    records = load_records(options.prompts, "prompts", options.limit, options.seed).records
    scorer = scorer_of(options, records)
    sampler = load_sampler(options.policy, options.device, options.dtype)
    records, prompt_ids = shown_prompts(records, sampler, options)
    answers = answers_of(records, prompt_ids, sampler, scorer, options)
    facts = {
        "policy": options.policy, "fingerprint": fingerprint(trunk(sampler.model)), "scorer": options.scorer,
        "seed": options.seed,
    }
    rows, dropped = pairs_of(records, answers, options.min_margin, options.pairs_per_prompt, facts)
    if not rows:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise LabError(f"data preferences: no pair is left ({why}); lower --min-margin, or raise --k or --limit")
    splits = split(rows, options.held_out)
    options.folder.mkdir(parents=True, exist_ok=True)
    options.file("test").unlink(missing_ok=True)  # of an earlier build, whose prompts may be trained on now
    for name, own in splits.items():
        write_rows(options.file(name), own)
    summary = {
        "data": "preferences", "command": options.command(), **facts,
        "weights": {part.name: part.weight for part in scorer.parts}, "prompts": len(records), "k": options.k,
        "answers": len(records) * options.k, "possible pairs": len(records) * math.comb(options.k, 2),
        "dropped": dropped, "seconds": round(time.monotonic() - begun, 1),
        "splits": {name: told(options.file(name), own) for name, own in splits.items()},
    }
    write_json(options.beside(".json"), summary)
    write_text(options.beside(".md"), card(summary))
    return summary


def scorer_of(options: PreferenceOptions, records: Sequence[Prompt]) -> Reward:
    """What `--scorer` names, as named parts: the rubric, or a reward's line, whose parts are not normalised."""
    if options.scorer == "rubric":
        weights = dict(options.weights) or dict.fromkeys(RUBRIC, 1 / len(RUBRIC))
        _labels_there(records, "--scorer rubric has the part label", "weigh other parts, as in --weight length=1",
                      needed="label" in weights)
        return Reward(tuple(RewardPart(name, RUBRIC[name], weight) for name, weight in weights.items()))
    named = terms(options.scorer)
    _labels_there(records, "--scorer has rubric:label", "leave it out", any(t.name == "rubric:label" for t in named))
    if options.want != "label" or not any(term.is_model and kind_of(term.name) != "reward" for term in named):
        return reward_of(options.scorer, options.want, device=options.device)
    if len(named) > 1 or named[0] != Term(1.0, named[0].name):
        raise UserError(
            "--want label: for one classifier as --scorer, without weight or p(); of a reward in parts give positive "
            "or negative"
        )
    _labels_there(records, "--want label", "give --want positive", needed=True)
    classifier = TextClassifier.load(named[0].name, device=options.device)
    return Reward((RewardPart(Path(named[0].name).resolve().name, own_log_odds(classifier)),))


def _labels_there(records: Sequence[Prompt], what: str, remedy: str, needed: bool) -> None:
    bare = next((record.id for record in records if record.label is None), None)
    if needed and bare is not None:
        raise UserError(f"{what}, but prompt {bare} has no label; give the prompts labels, or {remedy}")


def own_log_odds(classifier: TextClassifier) -> RewardFunction:
    """Reward function: the log-odds of each record's own label."""
    positive = log_odds(classifier, "positive")

    def score(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> Tensor:
        signs = torch.tensor([1.0 if record.label else -1.0 for record in records])
        scores: Tensor = positive(prompts, completions, records) * signs
        return scores

    return score


def shown_prompts(
    records: Sequence[Prompt], sampler: Sampler, options: PreferenceOptions
) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts as the policy reads them, and their tokens: whole, or openings whose length their id draws.

    Of a prompt that leaves no room for an answer the policy reads the end; the row keeps all of it.
    """
    room = int(sampler.model.config.max_position_embeddings) - options.max_new_tokens
    if room < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: the policy's context leaves no room for a prompt")
    if options.prompt_tokens is None:
        return list(records), [ids[-room:] for ids in encode([r.prompt for r in records], sampler.tokenizer)]
    low, high = options.prompt_tokens
    if high > room:
        raise UserError(f"--prompt-tokens {low},{high}: the policy's context has room for {room} before an answer")
    ids = [
        openings([r.prompt], sampler.tokenizer, low, high, number_of(options.seed, r.id, "opening"))[0] for r in records
    ]
    texts = [sampler.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in ids]
    return [Prompt(r.id, text, r.label) for r, text in zip(records, texts, strict=True)], ids


def answers_of(
    records: Sequence[Prompt], prompt_ids: Sequence[list[int]], sampler: Sampler, scorer: Reward,
    options: PreferenceOptions,
) -> list[list[Answer]]:
    """`k` answers to each prompt, scored."""
    places = [(row, number) for row in range(len(records)) for number in range(options.k)]
    seeds = [number_of(options.seed, records[row].id, number) for row, number in places]
    decoding = Decoding(options.max_new_tokens, options.temperature)
    texts, ended = sample_texts(sampler, [prompt_ids[row] for row, _ in places], seeds, decoding, options.batch_size)
    asked = [records[row] for row, _ in places]
    scores, parts = scorer([record.prompt for record in asked], texts, asked)
    columns = {name: values.tolist() for name, values in parts.items()}
    answers: list[list[Answer]] = [[] for _ in records]
    for i, ((row, number), score) in enumerate(zip(places, scores.tolist(), strict=True)):
        own = {name: round(values[i], 6) for name, values in columns.items()}
        answers[row].append(Answer(number, seeds[i], texts[i], score, own, ended[i]))
    return answers
