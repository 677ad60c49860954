"""Explanations of a review's sentiment: the one place that spells prompt and answer, and reads them back. No torch.

    Review: {the review}
    Question: Is this review positive or negative, and why?
    Answer: Positive. The reviewer praises "a lovely, lovely film".
"""

from __future__ import annotations

import functools
import re

from .overlap import words

SENTIMENTS = ("negative", "positive")
# Characters; in the tokens of tiny-gpt2 such a review leaves room for its answer in a context of 512.
LONGEST_REVIEW = 2_000
QUESTION = "Question: Is this review positive or negative, and why?"
_PROMPT = re.compile(rf"Review: (.*)\n{re.escape(QUESTION)}", re.DOTALL)
_LABEL = re.compile(r"\s*(negative|positive)\b[\s.:,;-]*", re.IGNORECASE)
_SAID = re.compile(r"(?:(\bnot|\bnever|n['’]t)\s+(?:an?\s+)?)?\b(negative|positive)\b", re.IGNORECASE)
_QUOTED = re.compile(r"[\"“”]([^\"“”]+)[\"“”]")


def prompt_of(review: str) -> str:
    """What a model is asked about a review; the answer follows at once and begins with a space."""
    return f"Review: {review}\n{QUESTION}\nAnswer:"


def review_of(prompt: str) -> str:
    """The review inside a prompt, also where a chat template surrounds it; any other prompt counts as a whole."""
    found = _PROMPT.search(prompt)
    return found[1] if found else prompt


def answer_of(label: int, reason: str) -> str:
    """The answer: a space, the label's name, and the reason, which is a sentence of its own."""
    return f" {SENTIMENTS[label].capitalize()}. {reason}"


def stated_label(answer: str) -> int | None:
    """The label that an answer states: its first word, or the only one named in its first sentence; else None.

    "not positive" states nothing: it may go on "but not negative either".
    """
    first = _LABEL.match(answer)
    if first:
        return SENTIMENTS.index(first[1].lower())
    sentence = re.split(r"[.!?\n]", answer.strip(), maxsplit=1)[0]
    said = {(bool(negated), name.lower()) for negated, name in _SAID.findall(_QUOTED.sub(" ", sentence))}
    if len(said) != 1:
        return None
    negated, name = said.pop()
    return None if negated else SENTIMENTS.index(name)


def reason_of(answer: str) -> str:
    """The answer without the label that it begins with."""
    return _LABEL.sub("", answer, count=1).strip() if _LABEL.match(answer) else answer.strip()


def quotations(text: str) -> list[str]:
    """What stands between double quotation marks, straight or curly."""
    return _QUOTED.findall(text)


def unquoted(text: str) -> str:
    """A text without its quotations."""
    return _QUOTED.sub(" ", text)


def occurs(span: str, text: str) -> bool:
    """Whether the words of `span` stand in `text` one after the other, whatever case, white space and punctuation."""
    return f" {' '.join(words(span))} " in _spelled(text)


@functools.lru_cache(maxsize=64)  # one review is asked about many spans in a row
def _spelled(text: str) -> str:
    return f" {' '.join(words(text))} "
