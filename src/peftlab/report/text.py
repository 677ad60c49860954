"""Numbers and foreign text as the page shows them."""

from __future__ import annotations

import math
import unicodedata

from ..runs.metrics import Metric
from ..runs.sanitize import BIDI

NONE = "–"
_MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}  # the control pictures (␠ ␊ ␉) are missing from many fonts
OPENING = 240  # characters of a long prompt that show before it is unfolded
LONGEST = 4000  # characters of one sample; more is cut, and says so


def number(value: float | None, unit: str = "") -> str:
    """Three figures, thousands grouped, small magnitudes as powers of ten; bytes by their prefix."""
    if value is None or not math.isfinite(value):
        return NONE
    if unit == "bytes":
        return compact(value) + "B"
    size = abs(value)
    if size >= 999.5:
        text = f"{value:,.0f}"
    elif size == 0:
        text = "0"
    elif size >= 0.1:
        text = f"{value:.3f}" if size < 0.9995 else f"{value:#.3g}".rstrip(".")
    elif size >= 1e-3:
        text = f"{value:.3g}"
    else:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return text.replace("-", "−")


def signed(value: float | None) -> str:
    """As `number`, the plus sign written out."""
    text = number(value)
    return f"+{text}" if value is not None and value > 0 and text != NONE else text


def fixed(value: float | None, decimals: int, plus: bool = False) -> str:
    """A figure of a column: always `decimals` places, so that the points line up; what rounds to 0 has no sign."""
    if value is None or not math.isfinite(value):
        return NONE
    if round(value, decimals) == 0:
        value, plus = 0.0, False
    return f"{value:{'+' if plus else ''}.{decimals}f}".replace("-", "−")


def compact(value: float) -> str:
    """A tick's label: 0.002, 1.5, 20, 12k, 3M, 1e-5."""
    size = abs(value)
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scaled = value / (1e3 if prefix == "k" else limit)
            return (f"{scaled:.4g}" if abs(scaled) < 1e4 else f"{scaled:.1e}").replace("-", "−") + prefix
    text = f"{value:.6g}" if size == 0 or size >= 1e-3 else f"{value:.3g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def seconds(value: float | None) -> str:
    """8.2 s, 3 min 20 s, 2 h 5 min."""
    if value is None or not math.isfinite(value):
        return NONE
    if value < 60:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def visible(text: object, spaces: bool = False) -> list[tuple[str, bool]]:
    """`text` in pieces (piece, is_symbol): what would not show, or would reorder the page, became a symbol.

    With `spaces`, blanks and line ends too (for single tokens); a line end keeps its break after its symbol
    otherwise.
    """
    whole = str(text)
    shown = whole[:LONGEST]
    pieces: list[tuple[str, bool]] = []
    for char in shown:
        symbol = _symbol(char, spaces)
        if pieces and pieces[-1][1] == (symbol is not None):
            pieces[-1] = (pieces[-1][0] + (symbol or char), pieces[-1][1])
        else:
            pieces.append((symbol or char, symbol is not None))
    if len(whole) > LONGEST:
        pieces.append((f" … {len(whole) - LONGEST:,} characters more", True))
    return pieces


def opening(text: str) -> str:
    """The beginning of a text too long to stand unfolded; empty for others."""
    return f"{text[:OPENING]} …" if len(text) > 2 * OPENING else ""


def clean(text: object) -> str:
    """`visible` in one string."""
    return "".join(piece for piece, _ in visible(text))


def _symbol(char: str, spaces: bool) -> str | None:
    """What stands for `char`, None where it stands for itself."""
    if char in _MARKS:
        return _MARKS[char] if spaces else None
    if (
        char in BIDI
        or unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        and char not in "\u200d\u00ad"
    ):
        return f"⟨U+{ord(char):04X}⟩"
    return None


_TITLES = {
    "eval/f1": "F1",
    "eval/ece": "Calibration error",
    "eval/judge": "Independent judge",
    "eval/kl": "KL to the reference",
    "eval/perplexity_ratio": "Perplexity ratio under the reference",
    "compare/accuracy": "Accuracy of the one compared with",
    "eval/rouge1": "ROUGE-1",
    "eval/rouge2": "ROUGE-2",
    "eval/rougeL": "ROUGE-L",
    "compare/pair_accuracy_longer": "Pair accuracy of the longer answer",
    "compare/pair_accuracy_member": "Pair accuracy of a single member",
    "eval/ood_pair_accuracy": "Pair accuracy on another policy's",
    "compare/rouge1": "ROUGE-1 of the first sentence",
    "compare/rouge2": "ROUGE-2 of the first sentence",
    "compare/rougeL": "ROUGE-L of the first sentence",
    "rubric/label": "True label stated",
    "rubric/explained": "A reason given",
    "rubric/evidence": "Review cited",
    "rubric/length": "Length in bounds",
    "rubric/repetition": "Nothing said twice",
    "rubric/ended": "Last sentence whole",
    "rubric/all": "Every part full",
    "eval/distinct_1": "Distinct words",
    "eval/distinct_2": "Distinct word pairs",
    "eval/self_bleu_4": "Self-BLEU-4",
    "eval/eos_fraction": "Ended by EOS",
    "rollout/eos_fraction": "Ended by EOS",
    "eval/entropy": "Entropy",
    "eval/length": "Length",
    "eval/reward": "Reward",
    "reward/mean": "Reward",
    "reward/std": "Reward, spread",
    "kl/reference": "KL to the reference",
    "kl/exact": "KL to the reference, exact",
    "kl/k2": "KL to the reference, k2",
    "kl/k3": "KL to the reference, k3",
    "kl/coef": "KL coefficient",
    "train/lr": "Learning rate",
    "train/loss": "Training loss",
    "eval/loss": "Held-out loss",
    "train/tokens_per_s": "Speed",
    "policy/approx_kl": "Move of one step",
    "policy/grad_norm": "Gradient norm",
    "train/grad_norm": "Gradient norm",
    "value/explained_variance": "Explained variance",
    "memory/peak_bytes": "Peak memory",
    "time/step_s": "Seconds a step",
    "update/epochs": "Epochs a step",
    "data/tokens": "Training tokens",
    "data/rows": "Training rows",
}


def title(name: str) -> str:
    """A metric's name for people; the registry's name stands beside it."""
    if name in _TITLES:
        return _TITLES[name]
    group, _, last = name.rpartition("/")
    words = last.removesuffix("_s").replace("_", " ")
    if group in ("reward/part", "eval/part"):
        return f"Reward part: {words}"
    if group == "agreement":
        return f"Agreement with {words}"
    return (
        f"{group} {words}".capitalize() if group in ("policy", "value", "advantage") else words.capitalize()
    )


def sentence(words: str) -> str:
    """The words with a capital at the front, other letters as they are."""
    return words[:1].upper() + words[1:]


def direction(entry: Metric) -> str:
    """ "↑ higher", "↓ lower", or nothing where no direction is better."""
    return {"higher": "↑ higher", "lower": "↓ lower"}.get(entry.better or "", "")
