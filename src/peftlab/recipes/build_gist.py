"""`peftlab data gist`: what a review says, in one sentence."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.explanations import SENTIMENTS, occurs
from ..data.overlap import words
from ..data.records import LabelledText
from ..data.spans import principal_sentence
from ..data.tokenize import sentences
from ..models.classifier import TextClassifier
from ..rewards.rubric import COMMON, repetition
from .evidence import Evidence, margins
from .makers import BuildOptions, Maker, Writer, build, few_shot, first_sentence, grounded
from .tools import load_sampler

SHORTEST, LONGEST = 6, 30  # words
# The reviewer's voice, and notes in a row.
NOT_A_GIST = re.compile(r"\b(?:I|I'm|me|my|we|our|you)\b|;|\"")
SPECIFIC = 3  # content words that the gist has from the review: fewer fit any film
GROUNDED = 0.75  # share of a gist's content words that the review must have: the rest may be the model's own


@dataclass
class GapSentence:
    """The review's own sentence that is most like the rest of it."""

    name: str = "extractive"

    def make(self, reviews: Sequence[LabelledText]) -> list[str | None]:
        """One sentence a review; none where it is too short or too long for a gist."""
        return [_fitting(principal_sentence(review.text)) for review in reviews]


def _fitting(sentence: str | None) -> str | None:
    return " ".join(sentence.split()) if sentence and SHORTEST <= len(words(sentence)) <= LONGEST else None


# A small model invents when it is to sum up a whole review; it can join notes that were taken from it. The examples are
# about odd things, since it repeats what would suit any film, and each review is shown but some of them.
SHOTS = {
    1: [
        ("Set in Wales, it follows two shepherds; the sheepdog steals every scene; I laughed a lot",
         "A funny film about two shepherds in Wales, in which the sheepdog steals every scene."),
        ("The film tells of a nurse in Verdun; the last hour grips you; the organ music is superb; my wife cried",
         "A nurse in Verdun is the heroine of this moving story with a gripping last hour and superb organ music."),
        ("Twelve dwarfs rob a bank; a silly idea that works wonderfully; I bought the DVD",
         "Twelve dwarfs rob a bank in a silly film that works wonderfully."),
        ("Karloff plays a baker who goes mad; the bread oven scene is terrifying; I saw it in 1961",
         "Karloff is terrifying as a baker who goes mad, above all by his bread oven."),
        ("This is a documentary on beekeepers; it was never dull; the narrator could read me the phone book",
         "This documentary on beekeepers is never dull, thanks to its narrator."),
    ],
    0: [
        ("Set in Wales, it follows two shepherds; the sheepdog acts better than they do; I yawned a lot",
         "A tedious film about two shepherds in Wales, who act worse than their sheepdog."),
        ("The film tells of a nurse in Verdun; the last hour drags on; the organ music gave me a headache",
         "A nurse in Verdun is the heroine of this story, whose last hour drags and whose organ music hurts."),
        ("Twelve dwarfs rob a bank; a silly idea that never works; I sold the DVD",
         "Twelve dwarfs rob a bank in a silly film that never works."),
        ("Karloff plays a baker who goes mad; the bread oven scene is laughable; I saw it in 1961",
         "Karloff is laughable as a baker who goes mad, above all by his bread oven."),
        ("This is a documentary on beekeepers; it put me to sleep; the narrator seems to read the phone book",
         "This documentary on beekeepers puts one to sleep, as its narrator does."),
    ],
}
SHOWN_SHOTS = 3
OPENERS = ["A", "The film", "This", "The", "An", "It is"]
# What may be said of any review without being found in it.
_TELLING = "about acting bad boring cast comedy drama good great horror plot scene scenes story thriller whose"
TELLING = frozenset(_TELLING.split())


@dataclass
class Summarized:
    """What a chat model writes when it knows the label; the sample that keeps most to the review, of those that fit."""

    writer: Writer
    evidence: Evidence
    name: str

    def make(self, reviews: Sequence[LabelledText]) -> list[str | None]:
        """One sentence a review; none where no sample passes."""
        options, asked, starts = self.writer.options, [], []
        for review, spans in zip(reviews, self.evidence.spans(reviews), strict=True):
            draw = random.Random(f"{options.seed} {review.id}")
            drawn = draw.sample(SHOTS[review.label], SHOWN_SHOTS)
            shots = [(_ask(notes, review.label), gist) for notes, gist in drawn]
            asked.append(few_shot(shots, _ask(notes_of(review.text, [span.text for span in spans]), review.label)))
            openers = draw.sample(OPENERS, len(OPENERS))
            starts.append([openers[i % len(openers)] for i in range(options.samples)])
        return self.choose(reviews, self.writer.write(asked, starts, [review.id for review in reviews]))

    def choose(self, reviews: Sequence[LabelledText], texts: Sequence[Sequence[str]]) -> list[str | None]:
        """The sample that the classifier finds to agree most with the label, of those that hold."""
        pool = [(row, s) for row, own in enumerate(texts) for s in map(first_sentence, own)
                if s is not None and holds(s, reviews[row])]
        scores = margins(self.evidence.classifier, [s for _, s in pool], [reviews[row].label for row, _ in pool])
        best: dict[int, tuple[float, str]] = {}
        for (row, sentence), score in zip(pool, scores, strict=True):
            if score > best.get(row, (0.0, ""))[0]:
                best[row] = (score, sentence)
        return [best[row][1] if row in best else None for row in range(len(reviews))]


def holds(gist: str, review: LabelledText) -> bool:
    """Whether a sentence has a gist's length, the review's words and something of its own, and repeats nothing."""
    own = [word for word in set(words(gist)) - COMMON - TELLING if word in words(review.text)]
    return (
        SHORTEST <= len(words(gist)) <= LONGEST
        and len(own) >= SPECIFIC
        and not NOT_A_GIST.search(gist)
        and not occurs(gist, review.text)
        and not parrots(gist, review)
        and repetition([""], [gist], [review]) == [1.0]
        and grounded(gist, review.text, TELLING) >= GROUNDED
    )


def parrots(gist: str, review: LabelledText) -> bool:
    """Whether four words in a row are the examples' and not the review's."""
    told = words(gist)
    runs = [" ".join(told[i : i + 4]) for i in range(len(told) - 3)]
    shots = [sentence for pairs in SHOTS.values() for _, sentence in pairs]
    return any(occurs(run, shot) and not occurs(run, review.text) for run in runs for shot in shots)


def notes_of(review: str, spans: Sequence[str]) -> str:
    """A review's first and principal sentences, where they are short enough, and its telling spans not in them."""
    parts = [sentences(review)[0], principal_sentence(review) or ""]
    notes = [part for part in dict.fromkeys(parts) if 0 < len(words(part)) <= LONGEST]
    notes += [span for span in spans if not any(span in note for note in notes)]
    return "; ".join(note.strip(" .!?") for note in notes or [" ".join(review.split()[:LONGEST])])


def _ask(notes: str, label: int) -> str:
    return f"Notes on a film: {notes}.\n\nJoin them to one short {SENTIMENTS[label]} sentence about the film."


def run(options: BuildOptions, output: Path) -> dict[str, Any]:
    """Build both splits into `output`; the summary. `both` lets the principal sentence serve where no sample passed."""
    makers: list[Maker] = []
    if options.maker in ("model", "both"):
        writer = Writer(load_sampler(options.model, options.device, options.dtype), options)
        evidence = Evidence(TextClassifier.load(options.classifier, device=options.device))
        makers.append(Summarized(writer, evidence, options.model))
    if options.maker in ("extractive", "both"):
        makers.append(GapSentence())
    return build("gist", "summary", makers, options, output)
