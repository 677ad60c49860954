"""What builds data from reviews: makers behind one interface, and the one way to run them and write what they made."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..data.explanations import LONGEST_REVIEW, SENTIMENTS
from ..data.imdb import load_block
from ..data.joined import BLOCK_OF, digest
from ..data.overlap import words
from ..data.records import LabelledText, Message
from ..errors import LabError, UserError
from ..rewards.rubric import COMMON
from ..runs.atomic import write_bytes, write_json, write_text
from ..runs.progress import Progress
from ..sampling.sampler import Decoding, Sampler

SHOWN = 5


class Maker(Protocol):
    """Makes a text of each review, None where it has none good enough; `name` goes into the data."""

    name: str

    def make(self, reviews: Sequence[LabelledText]) -> list[str | None]:
        """One text a review, in order."""
        ...


@dataclass(frozen=True)
class BuildOptions:
    """How to build a data set. `rows` and `held_out` reviews are drawn; `samples` texts a review are written by a model
    in batches of `batch_size` rows."""

    maker: str = "both"
    model: str = "smollm2-135m"
    classifier: str = "imdb-sentiment"
    rows: int = 9_000
    held_out: int = 1_100
    samples: int = 4
    batch_size: int = 256
    temperature: float = 0.6
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.maker not in ("extractive", "model", "both"):
            raise UserError(f"--maker {self.maker}: give extractive, model or both")
        for name, low in (("rows", 0), ("held_out", 0), ("samples", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: give {low} or more")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: give float32 or bfloat16")
        if not 0 < self.temperature < math.inf:  # NaN too
            raise UserError(f"--temperature {self.temperature}: give more than 0; the samples of a review must differ")

    def command(self, what: str) -> str:
        """The command that builds the same again."""
        given = vars(self).items()
        return f"peftlab data {what} " + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in given if k != "device")


@dataclass
class Writer:
    """A chat model that writes: each request is a conversation and the beginnings that its answers are held to."""

    sampler: Sampler
    options: BuildOptions
    max_new_tokens: int = 48

    def write(
        self, asked: Sequence[Sequence[Message]], openers: Sequence[Sequence[str]], ids: Sequence[str]
    ) -> list[list[str]]:
        """For each conversation one text an opener, beginning with it. What is written depends on seed and id only."""
        places = [(row, number) for row, starts in enumerate(openers) for number in range(len(starts))]
        chats = [self._spell(turns) for turns in asked]
        prompts = self._encode([chats[row] + openers[row][number] for row, number in places])
        seeds = [number_of(self.options.seed, ids[row], number) for row, number in places]
        decoding = Decoding(self.max_new_tokens, self.options.temperature)
        texts = [[""] * len(starts) for starts in openers]
        written, _ = sample_texts(self.sampler, prompts, seeds, decoding, self.options.batch_size)
        for (row, number), text in zip(places, written, strict=True):
            texts[row][number] = openers[row][number] + text
        return texts

    def _spell(self, turns: Sequence[Message]) -> str:
        """The conversation in the model's own chat template, up to where it answers; plain turns where it has none."""
        tokenizer: Any = self.sampler.tokenizer
        if not tokenizer.chat_template:
            return "".join(f"{turn.content}\n" for turn in turns)
        plain = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = self.sampler.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        room = int(self.sampler.model.config.max_position_embeddings) - self.max_new_tokens
        return [ids[-room:] for ids in rows]


def sample_texts(
    sampler: Sampler,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    decoding: Decoding,
    batch_size: int,
    author: str = "",
) -> tuple[list[str], list[bool]]:
    """What the model writes behind each prompt, in their order, row i from seeds[i]; and whether EOS ended it.

    `author`: whom the lines of progress name, where several models write one after the other.
    Rows of similar length share a batch, the longest first: what does not fit into memory fails at once.
    """
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    texts, ended = [""] * len(prompts), [False] * len(prompts)
    progress, begun, by = Progress(len(prompts)), time.monotonic(), f" by {author}" if author else ""
    for start in range(0, len(order), batch_size):
        Progress.heed()
        rows = order[start : start + batch_size]
        samples = sampler.sample([prompts[row] for row in rows], [seeds[row] for row in rows], decoding)
        for row, text, end in zip(rows, sampler.texts(samples), samples.ended.tolist(), strict=True):
            texts[row], ended[row] = text, end
        done = start + len(rows)
        progress.show(done, f"texts written{by}, {done / (time.monotonic() - begun):.0f} a second")
    return texts, ended


def few_shot(shots: Sequence[tuple[str, str]], question: str) -> list[Message]:
    """Questions with their answers as turns, then the question that is open."""
    turns = [Message(role, text) for pair in shots for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*turns, Message("user", question)]


def number_of(*what: object) -> int:
    """A number from 0 to 2^63 that follows from what is given, on every machine."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big") >> 1


def grounded(text: str, review: str, allowed: frozenset[str] = frozenset()) -> float:
    """The share of a text's content words that the review has too, the first five letters compared; 1 where none."""
    stems = {word[:5] for word in words(review)}
    told = [word for word in words(text) if word not in COMMON and word not in allowed]
    return sum(word[:5] in stems for word in told) / len(told) if told else 1.0


def first_sentence(text: str) -> str | None:
    """A text's first sentence, white space made single; None where nothing ends one."""
    found = re.match(r"""(.*?[.!?]["')]*)(?=\s|$)""", " ".join(text.split()))
    return found[1] if found else None


def build_data(what: str, options: BuildOptions, output: Path) -> dict[str, Any]:
    """Build "explanations" or "gist" into the folder `output`; the summary. Raises UserError where it can be none."""
    there = next((place for place in (output, *output.parents) if place.exists()), output)
    if there.exists() and not there.is_dir():  # asked before models load, which takes a while
        raise UserError(f"--output {output}: {there} is a file; give a folder")
    recipe = importlib.import_module(f"{__package__}.build_{what}")
    summary: dict[str, Any] = recipe.run(options, output)
    return summary


@dataclass
class Built:
    """The rows of one split, how many reviews it was drawn from, and what came of each maker's tries."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tried: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


def build(what: str, column: str, makers: Sequence[Maker], options: BuildOptions, output: Path) -> dict[str, Any]:
    """Draw reviews, let the makers try in turn, write WHAT-train.jsonl.gz, WHAT-test.jsonl.gz and the summary.

    A later maker gets the reviews of which the earlier ones made nothing. Rows hold no review: id, its hash, the text.
    """
    output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    splits: dict[str, Any] = {}
    for split, count in (("train", options.rows), ("test", options.held_out)):
        if not count:
            continue
        reviews = draw(split, count, options.seed)
        built = make(column, makers, reviews)
        if not built.rows:
            raise LabError(f"data {what}: no maker made anything of {len(reviews)} reviews; see --maker and --model")
        data = "".join(json.dumps(row) + "\n" for row in built.rows).encode("ascii")
        name = f"{what}-{split}.jsonl.gz"
        write_bytes(output / name, gzip.compress(data, mtime=0))
        labels = Counter(review.label for review in reviews)
        splits[split] = {
            "file": name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "reviews": len(reviews),
            "labels": {str(label): labels[label] for label in sorted(labels)},
            "rows": len(built.rows),
            "makers": {
                maker.name: {
                    "tried": built.tried[maker.name],
                    "made": built.made[maker.name],
                    "acceptance": round(built.made[maker.name] / max(1, built.tried[maker.name]), 4),
                }
                for maker in makers
            },
            "examples": built.examples,
        }
    summary = {
        "data": what, "command": options.command(what), "seed": options.seed, "model": options.model,
        "classifier": options.classifier, "seconds": round(time.monotonic() - begun, 1), "splits": splits,
    }
    write_json(output / f"{what}.json", summary)
    write_text(output / f"{what}.md", card(summary))
    return summary


def draw(split: str, count: int, seed: int) -> list[LabelledText]:
    """`count` reviews of the split's block that are short enough, seeded; all where there are fewer."""
    reviews = [review for review in load_block(BLOCK_OF[split]) if len(review.text) <= LONGEST_REVIEW]
    return random.Random(f"{seed} {split}").sample(reviews, min(count, len(reviews)))


def make(column: str, makers: Sequence[Maker], reviews: Sequence[LabelledText]) -> Built:
    """Each maker in turn on what is left; rows in the order of the reviews."""
    built, texts = Built(), dict[str, tuple[str, str]]()
    for maker in makers:
        left = [review for review in reviews if review.id not in texts]
        made = {r.id: (text, maker.name) for r, text in zip(left, maker.make(left), strict=True) if text is not None}
        built.tried[maker.name], built.made[maker.name] = len(left), len(made)
        texts |= made
    shown: Counter[tuple[str, int]] = Counter()
    for review in reviews:
        if review.id not in texts:
            continue
        text, name = texts[review.id]
        built.rows.append({"id": review.id, "sha": digest(review.text), column: text, "maker": name})
        shown[name, review.label] += 1
        if shown[name, review.label] <= SHOWN:
            built.examples.append(f"{review.id} ({SENTIMENTS[review.label]}, {name}): {text.strip()}")
    return built


def card(summary: dict[str, Any]) -> str:
    """The summary for a person."""
    lines = [f"# imdb-{summary['data']}", "", f"`{summary['command']}`", ""]
    for split, told in summary["splits"].items():
        lines += [f"## {split}: {told['rows']} rows from {told['reviews']} reviews", "", "| maker | tried | made |",
                  "|---|---|---|"]
        lines += [f"| {name} | {m['tried']} | {m['made']} ({m['acceptance']:.1%}) |" for name, m in
                  told["makers"].items()]
        lines += ["", *(f"- {example}" for example in told["examples"]), ""]
    return "\n".join(lines)
