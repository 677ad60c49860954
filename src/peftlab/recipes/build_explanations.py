"""`peftlab data explanations`: why a review is positive or negative, in a sentence that cites it."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.explanations import SENTIMENTS, answer_of, occurs, prompt_of, quotations, reason_of, unquoted
from ..data.overlap import words
from ..data.records import LabelledText, Prompt
from ..models.classifier import TextClassifier
from ..rewards.rubric import rubric_scores
from .evidence import DANGLING, FIRM, Evidence, margins
from .makers import BuildOptions, Maker, Writer, build, few_shot, first_sentence, grounded
from .tools import load_sampler

# Two spans are cited where both speak for the label.
BOTH = [
    'The reviewer says "{0}" and "{1}".',
    'It reads "{0}", and elsewhere "{1}".',
    'Two remarks tell: "{0}" and "{1}".',
]
PHRASES = [
    'The reviewer writes "{0}".',
    'The reviewer says "{0}".',
    "The reviewer's own words are \"{0}\".",
    'It says "{0}".',
    'One remark sums it up: "{0}".',
    'The words "{0}" make that plain.',
    'Nobody who felt otherwise would write "{0}".',
    'The verdict is in the words "{0}".',
]
PRAISE = [
    'The reviewer liked it and writes "{0}".',
    'The reviewer has praise for it: "{0}".',
    'The words "{0}" are praise.',
    'The reviewer was won over, as "{0}" shows.',
    'What the reviewer enjoyed shows in "{0}".',
    'The reviewer is pleased and says "{0}".',
]
BLAME = [
    'The reviewer did not like it and writes "{0}".',
    'The reviewer complains: "{0}".',
    'The words "{0}" are a complaint.',
    'The reviewer was let down, as "{0}" shows.',
    'What the reviewer disliked shows in "{0}".',
    'The reviewer is annoyed and says "{0}".',
]


@dataclass
class Extractive:
    """The span that a classifier finds most telling, in a phrase drawn by the row's id."""

    evidence: Evidence
    seed: int
    name: str = "extractive"

    def make(self, reviews: Sequence[LabelledText]) -> list[str | None]:
        """One answer a review; none where no span speaks for its label."""
        return [
            self._phrase(review, [span.text for span in spans]) if spans else None
            for review, spans in zip(reviews, self.evidence.spans(reviews), strict=True)
        ]

    def _phrase(self, review: LabelledText, spans: list[str]) -> str:
        draw = random.Random(f"{self.seed} {review.id}")
        own = PRAISE if review.label else BLAME
        phrase = draw.choice(BOTH if len(spans) > 1 and draw.random() < 0.3 else draw.choice([PHRASES, own]))
        return answer_of(review.label, phrase.format(*spans))


SHOTS = {
    1: [
        ("I went in expecting little. The two leads are a joy to watch and I laughed until it hurt.",
         'The reviewer says the two leads "are a joy to watch" and laughed until it hurt.'),
        ("It starts slowly, but the last hour grips you and the music is superb. My wife cried.",
         'The reviewer says "the last hour grips you" and praises the music.'),
        ("What a cast! Every scene rings true. Do not miss this gem if it comes to a cinema near you.",
         'The reviewer calls it a "gem" in which "every scene rings true".'),
    ],
    0: [
        ("I went in expecting much. The two leads have no chemistry and I looked at my watch all the time.",
         'The reviewer says the two leads "have no chemistry" and looked at the watch all the time.'),
        ("Nice scenery, but the plot makes no sense and the jokes fall flat. My wife slept.",
         'The reviewer says "the plot makes no sense" and the jokes fall flat.'),
        ("What were they thinking? The script sounds as if a child wrote it. Avoid this mess at all costs.",
         'The reviewer calls it a "mess" whose script "sounds as if a child wrote it".'),
    ],
}
# The answer's beginning is given: a small model quotes when it stands in a quotation.
OPENERS = {
    1: ['The reviewer says "', 'The reviewer writes "', 'The reviewer calls it "', 'The reviewer praises "',
        'The reviewer liked it because "', "The reviewer says the"],
    0: ['The reviewer says "', 'The reviewer writes "', 'The reviewer calls it "', 'The reviewer complains that "',
        'The reviewer did not like it because "', "The reviewer says the"],
}
# Before the telling span; the model goes on behind it.
VERBS = {
    1: ["The reviewer says", "The reviewer writes", "The reviewer is pleased that", "The reviewer notes"],
    0: ["The reviewer says", "The reviewer writes", "The reviewer complains that", "The reviewer notes"],
}
OWN = 2.0  # nats: how much less telling evidence may be for a reason that goes on in words of its own
# What a reason may say of any review without finding it there.
_TELLING = """
adds admire admires and annoyed applauds bad because believes bored boring both calls comments complains concludes
criticizes criticises describes disappointed disappointing dislikes enjoyed enjoys entire especially explains feels
finds found fun good great hates highlights impressed lacks likes liked love loved loves mentions notes overall
particularly praise praises quality recommends states thinks thought writer writes
"""
TELLING = frozenset(_TELLING.split())
# What a reason for a label does not say of the reviewer.
CONTRARY = {
    1: re.compile(r"\b(?:complain|criti[cq]|dislik|disappoint|annoy|hate|mock|question|not |n't )", re.IGNORECASE),
    0: re.compile(r"\b(?:prais|enjoy|recommend|lov|admir|applaud|impress|likes|liked)", re.IGNORECASE),
}
# What may follow a quotation: other words tend to make no sentence with it.
_GOES_ON = re.compile(r"[.,!?]|\s(?:and|but|because|as|although|though|in which)\b")
LONGEST_QUOTE = 16  # words: beyond it the model recites the review
OWN_WORDS = 0.75  # share of the content words outside quotations that the review must have


def _ask(review: str, name: str) -> str:
    return f"Review: {review}\n\nWhy is this review {name}? Quote it in one short sentence."


def reasons(reason: str, review: LabelledText, given: str = "") -> list[str]:
    """What a model wrote after the label, as the sentences it can be used as.

    They are the first whole one, and the opening up to the end of its first quotation, unless that was `given`: the
    opening often is true where a small model goes on inventing.
    """
    text = " ".join(reason.split())
    parts = text.split('"')
    found = [first_sentence(text)]
    if len(parts) > 2 and not given and words(parts[1]) and words(parts[1])[-1] not in DANGLING:
        found.append(f'{parts[0]}"{parts[1].strip(" .,;:")}".')
    return [c for c in dict.fromkeys(found) if c is not None and c[:-1] != given and holds(c, review)]


def holds(reason: str, review: LabelledText) -> bool:
    """Whether all that a reason quotes is in the review, and the rest has to do with it and suits the label."""
    quoted, own = quotations(reason), unquoted(reason)
    whole = reason.count('"') == 2 * len(quoted) and len({q.lower() for q in quoted}) == len(quoted)
    if not whole:
        return False
    true = all(len(words(q)) <= LONGEST_QUOTE and occurs(q, review.text) for q in quoted)
    suits = not CONTRARY[review.label].search(own) and (not quoted or bool(_GOES_ON.match(reason.split('"')[2])))
    return true and suits and grounded(own, review.text, TELLING) >= OWN_WORDS


@dataclass
class Written:
    """What a chat model writes when it knows the label; the best of its samples that pass the rubric."""

    writer: Writer
    evidence: Evidence
    name: str

    def make(self, reviews: Sequence[LabelledText]) -> list[str | None]:
        """One answer a review; none where no sample passes."""
        asked, starts = [], []
        for review in reviews:
            name = SENTIMENTS[review.label]
            shots = [(_ask(text, name), f"{name.capitalize()}. {reason}") for text, reason in SHOTS[review.label]]
            asked.append(few_shot(shots, _ask(review.text, name)))
        given = self._given(reviews)
        for review, own in zip(reviews, given, strict=True):
            starts.append([answer_of(review.label, opener).strip() for opener in own])
        texts = self.writer.write(asked, starts, [review.id for review in reviews])
        return self.choose(reviews, given, texts)

    def _given(self, reviews: Sequence[LabelledText]) -> list[list[str]]:
        """How each sample of a review begins: in turn with a quotation to choose, and with the telling one."""
        options, openers = self.writer.options, []
        for review, spans in zip(reviews, self.evidence.spans(reviews), strict=True):
            draw = random.Random(f"{options.seed} {review.id}")
            free = draw.sample(OPENERS[review.label], len(OPENERS[review.label]))
            told = [f'{verb} "{span.text}"' for span in spans[:2] for verb in draw.sample(VERBS[review.label], 2)]
            pairs = itertools.zip_longest(free, told[: len(free)])
            both = [opener for pair in pairs for opener in pair if opener is not None]
            openers.append([both[i % len(both)] for i in range(options.samples)])
        return openers

    def choose(
        self, reviews: Sequence[LabelledText], given: Sequence[Sequence[str]], texts: Sequence[Sequence[str]]
    ) -> list[str | None]:
        """Of the samples that pass the rubric the one whose evidence tells most; own words count for it."""
        pool: list[tuple[int, str, float]] = []
        for row, review in enumerate(reviews):
            found: dict[str, None] = {}
            for start, text in zip(given[row], texts[row], strict=True):
                known = start if quotations(start) else ""
                found |= dict.fromkeys(reasons(reason_of(text), review, known))
            answers = [answer_of(review.label, reason) for reason in found]
            record = Prompt(review.id, "", review.label)
            scores = rubric_scores([prompt_of(review.text)] * len(found), answers, [record] * len(found)).values()
            for number, reason in enumerate(found):
                if all(part[number] == 1 for part in scores):
                    pool.append((row, reason, OWN if words(reason.rpartition('"')[2]) else 0.0))
        labels = [reviews[row].label for row, _, _ in pool]
        cited = margins(self.evidence.classifier, [" ".join(quotations(r)) or r for _, r, _ in pool], labels)
        whole = margins(self.evidence.classifier, [reason for _, reason, _ in pool], labels)
        best: dict[int, tuple[float, str]] = {}
        for (row, reason, bonus), score, overall in zip(pool, cited, whole, strict=True):
            if score >= FIRM and overall > 0 and score + bonus > best.get(row, (0.0, ""))[0]:
                best[row] = (score + bonus, reason)
        return [answer_of(r.label, best[i][1]) if i in best else None for i, r in enumerate(reviews)]


def run(options: BuildOptions, output: Path) -> dict[str, Any]:
    """Build both splits into `output`; the summary. `both` lets the classifier's spans serve where no sample passed."""
    evidence = Evidence(TextClassifier.load(options.classifier, device=options.device))
    makers: list[Maker] = []
    if options.maker in ("model", "both"):
        writer = Writer(load_sampler(options.model, options.device, options.dtype), options)
        makers.append(Written(writer, evidence, options.model))
    if options.maker in ("extractive", "both"):
        makers.append(Extractive(evidence, options.seed))
    return build("explanations", "answer", makers, options, output)
