"""The rubric of sentiment explanations: named parts, each from 0 to 1. No torch.

A part is a function (prompts, completions, records) -> one number a completion, as every reward is. What an answer
looks like is told by data/explanations.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..data.explanations import occurs, quotations, reason_of, review_of, stated_label
from ..data.overlap import ngrams, words
from ..errors import LabError, UserError

Part = Callable[[Sequence[str], Sequence[str], Sequence[Any]], list[float]]
# Words that tell nothing of one film: a run of these alone is in any review, and is no evidence.
_COMMON = """
a about all also an and any are as at be because been but by can could did do does film films for from had has have he
her him his how i if in into is it its just me more most movie movies my no not of off on one only or other our out
review reviewer s said say says see she so some t than that the their them there these they this to up us very was
watch we well were what when which who why will with would you your
"""
COMMON = frozenset(_COMMON.split())
RUN = 3
_END = re.compile(r"""[.!?…]["'”’)\]]*\s*$""")


def label(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> list[float]:
    """1 where the answer states the record's gold label. Raises LabError for a record without a label."""
    bare = next((record.id for record in records if record.label is None), None)
    if bare is not None:
        raise LabError(f"rubric part label: row {bare} has no label to compare with; give the prompts a `label`")
    return [float(stated_label(text) == record.label) for text, record in zip(completions, records, strict=True)]


def explained(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> list[float]:
    """1 where four words or more stand beside the label: fewer give no reason."""
    return [float(len(words(reason_of(text))) >= 4) for text in completions]


def evidence(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> list[float]:
    """1 where the reason cites the review: a quotation of two words or more, or a run of three, that stands in it.

    Case, white space and punctuation do not count. Of what is cited one word at least must be no common one, since
    "this is a" stands in every review.
    """
    return [float(cites(reason_of(text), review_of(prompt))) for prompt, text in zip(prompts, completions, strict=True)]


def cites(reason: str, review: str) -> bool:
    """Whether a reason cites a review; see `evidence`."""
    spans = [words(quoted) for quoted in quotations(reason)]
    spans = [span for span in spans if len(span) >= 2]
    spoken = words(reason)
    spans += [spoken[i : i + RUN] for i in range(len(spoken) - RUN + 1)]
    return any(not COMMON.issuperset(span) and occurs(" ".join(span), review) for span in spans)


def length_band(low: int = 6, high: int = 45) -> Part:
    """A part: 1 where the answer has `low` to `high` words; below it words / low, above it high / words."""
    if not 0 < low <= high:
        raise UserError(f"rubric part length: a band of {low} to {high} words holds nothing; give 0 < low <= high")

    def length(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> list[float]:
        counts = [len(words(text)) for text in completions]
        return [min(1.0, count / low, high / max(1, count)) for count in counts]

    return length


def repetition(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> list[float]:
    """Distinct word 3-grams over all of the answer's: 1 where nothing is said twice, 1 for fewer than three words."""
    scores = []
    for text in completions:
        grams = ngrams(words(text), 3)
        scores.append(len(grams) / grams.total() if grams else 1.0)
    return scores


def style(wanted: Sequence[str] = (), unwanted: Sequence[str] = ()) -> Part:
    """A part: the share of these rules that an answer keeps; a pattern `wanted` is found in it, one `unwanted` is not.

    Patterns are Python's regular expressions, whatever case. Raises UserError for one that is none, or with no rule.
    """
    if not wanted and not unwanted:
        raise UserError("rubric part style: has no pattern; give wanted or unwanted ones")
    rules = []
    for pattern, is_wanted in [*((p, True) for p in wanted), *((p, False) for p in unwanted)]:
        try:
            rules.append((re.compile(pattern, re.IGNORECASE), is_wanted))
        except re.error as error:
            raise UserError(f"rubric part style: {pattern!r} is no regular expression: {error}") from None

    def score(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> list[float]:
        return [sum(bool(rule.search(t)) == is_wanted for rule, is_wanted in rules) / len(rules) for t in completions]

    return score


def ended(prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]) -> list[float]:
    """1 where the answer's last sentence is whole. Whether its EOS was sampled, only the sampler knows."""
    return [float(bool(_END.search(text))) for text in completions]


RUBRIC: dict[str, Part] = {
    "label": label,
    "explained": explained,
    "evidence": evidence,
    "length": length_band(),
    "repetition": repetition,
    "ended": ended,
}


def rubric_scores(
    prompts: Sequence[str], completions: Sequence[str], records: Sequence[Any]
) -> dict[str, list[float]]:
    """Every part of RUBRIC, each one number a completion."""
    return {name: part(prompts, completions, records) for name, part in RUBRIC.items()}
