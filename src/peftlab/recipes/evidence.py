"""Where a review says what its label says: spans scored by a sentiment classifier."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..data.overlap import words
from ..data.records import LabelledText
from ..data.tokenize import sentences
from ..models.classifier import TextClassifier
from ..rewards.rubric import COMMON

SHORTEST, LONGEST = 3, 12  # words
WINDOW = 8
FIRM = 1.25  # nats: the log-odds that a span has alone, at least; below it, by eye, a quarter says nothing
# The spans that stand best alone; each costs the classifier a whole review more.
OCCLUDED = 3
_CLAUSE = re.compile(r"\s*(?:[,;:()\[\]*\n]|\s--?\s|\.\.+|…|\s(?=(?:but|because|although|though|while)\s))\s*")
# What a clause of its own neither begins nor ends with.
_BEFORE = re.compile(r"^(?:(?:and|but|so|or|because|although|though|while|also|that|which)\s+)+", re.IGNORECASE)
_DANGLING = """
a an and are as at be because been but by for from had has have his if in including into is its like my of on or our
so such than that the their this to very was were when where which while who with your featuring
"""
DANGLING = frozenset(_DANGLING.split())


@dataclass(frozen=True)
class Span:
    """A piece of a review, as it is spelled there; `score` in nats, above 0 where it speaks for the label."""

    text: str
    score: float


@dataclass
class Evidence:
    """The telling spans of reviews by a classifier; each review is asked about once."""

    classifier: TextClassifier
    known: dict[str, list[Span]] = field(default_factory=dict)

    def spans(self, reviews: Sequence[LabelledText]) -> list[list[Span]]:
        """For each review the spans that speak for its label, best first; none where no span does."""
        new = [review for review in reviews if review.id not in self.known]
        self.known |= {r.id: own for r, own in zip(new, best_spans(self.classifier, new), strict=True)}
        return [self.known[review.id] for review in reviews]


def clauses(review: str) -> list[str]:
    """The clauses of a review that have 3 to 12 words and can be cited, each once."""
    return list(dict.fromkeys(part for part in _parts(review) if _fits(part)))


def windows(review: str) -> list[str]:
    """Pieces of the clauses of more than 12 words, for a review none of whose clauses tells anything."""
    found: dict[str, None] = {}
    for part in _parts(review):
        places = [(word.start(), word.end()) for word in re.finditer(r"\S+", part)]
        for start in range(0, len(places) - LONGEST, WINDOW // 2):
            # Cut from the text, its white space kept, so that the piece is found in the review.
            piece = _BEFORE.sub("", part[places[start][0] : places[start + WINDOW - 1][1]])
            while (last := re.search(r"\s*(\S+)$", piece)) and last[1].lower() in DANGLING:
                piece = piece[: last.start()]
            found[piece] = None
    return [piece for piece in found if _fits(piece)]


def _parts(review: str) -> Iterator[str]:
    for sentence in sentences(review):
        for clause in _CLAUSE.split(sentence):
            yield _BEFORE.sub("", clause.strip(" .!?'-\t"))


def _fits(span: str) -> bool:
    told = words(span)
    if not SHORTEST <= len(told) <= LONGEST or told[-1] in DANGLING:
        return False
    return not re.search("[\"“”]", span) and not COMMON.issuperset(told)


def best_spans(classifier: TextClassifier, reviews: Sequence[LabelledText]) -> list[list[Span]]:
    """For each review the spans that speak for its label, best first; none where no span does.

    A span's score is its own log-odds for the label plus what the review's log-odds lose without it: the first asks
    whether it can be understood alone, the second whether it mattered here.
    """
    tops = _alone(classifier, reviews, clauses)
    bare = [row for row, top in enumerate(tops) if not top]
    for row, top in zip(bare, _alone(classifier, [reviews[row] for row in bare], windows), strict=True):
        tops[row] = top[:1]  # the others overlap it
    owners = [review for review, top in zip(reviews, tops, strict=True) for _ in top]
    spans = [span for top in tops for span in top]
    without = [review.text.replace(span.text, " ", 1) for review, span in zip(owners, spans, strict=True)]
    whole = margins(classifier, [review.text for review in reviews], [review.label for review in reviews])
    rest = iter(margins(classifier, without, [review.label for review in owners]))
    ranked = [[Span(s.text, s.score + full - next(rest)) for s in top] for full, top in zip(whole, tops, strict=True)]
    return [sorted(own, key=lambda span: -span.score) for own in ranked]


def _alone(
    classifier: TextClassifier, reviews: Sequence[LabelledText], cut: Callable[[str], list[str]]
) -> list[list[Span]]:
    """For each review the few of its pieces with the highest log-odds of its label, none below FIRM."""
    spans = [cut(review.text) for review in reviews]
    labels = [review.label for review, own in zip(reviews, spans, strict=True) for _ in own]
    scores = iter(margins(classifier, [span for own in spans for span in own], labels))
    scored = [[Span(span, next(scores)) for span in own] for own in spans]
    return [[s for s in sorted(own, key=lambda s: -s.score)[:OCCLUDED] if s.score >= FIRM] for own in scored]


def margins(classifier: TextClassifier, texts: Sequence[str], labels: Sequence[int]) -> list[float]:
    """Log-odds of each text's label, in nats."""
    if not texts:
        return []
    rows = classifier.logits(texts, batch_size=256).tolist()
    return [row[label] - row[1 - label] for row, label in zip(rows, labels, strict=True)]
