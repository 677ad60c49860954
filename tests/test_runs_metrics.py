"""The registry defines every metric, and docs/metrics.md is its print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftlab.runs.metrics import (
    FIRST_RATIO_LIMITS,
    METRICS,
    first_ratio_limit,
    glossary,
    healthy_text,
    metric,
)

ROOT = Path(__file__).resolve().parent.parent


def test_the_glossary_is_the_one_in_docs():
    printed = subprocess.run(
        [sys.executable, "-m", "peftlab.runs.metrics"], capture_output=True, text=True, check=True
    )
    assert printed.stdout == glossary()
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == glossary(), (
        "run: python -m peftlab.runs.metrics > docs/metrics.md"
    )


def test_a_prefix_has_one_table_in_the_order_of_the_registry():
    titles = re.findall("^## (.*)$", glossary(), re.M)
    assert len(titles) == len(set(titles)) and set(titles) == {name.split("/")[0] for name in METRICS}
    for title in titles:
        table = glossary().split(f"## {title}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(.*?)`", table, re.M) == [name for name in METRICS if name.startswith(f"{title}/")]


@pytest.mark.parametrize("entry", METRICS.values(), ids=METRICS)
def test_each_metric_is_defined_in_one_sentence(entry):
    assert entry.definition.endswith(".") and len(entry.definition) > 20
    assert entry.healthy is None or entry.source, "a healthy range names its source"
    assert entry.healthy is None or None in entry.healthy or entry.healthy[0] <= entry.healthy[1]
    assert f"`{entry.name}`" in glossary()


def test_patterns_match_any_part_and_nothing_else():
    assert metric("reward/part/length band").name == "reward/part/*"
    for name in ("reward/part/", "reward/part", "reward/parts/x", "eval/judgement", "", "*"):
        with pytest.raises(KeyError):
            metric(name)


def test_limits_of_the_invariants():
    assert metric("invariant/first_kl").limit == 0.0
    assert metric("invariant/first_ratio_error").limit == first_ratio_limit("fp32") == 1e-4
    assert first_ratio_limit("fp32", tiny_on_cpu=True) == 1e-5
    assert (
        first_ratio_limit("bf16", tiny_on_cpu=True)
        == first_ratio_limit("tf32")
        == max(FIRST_RATIO_LIMITS.values())
    )


def test_ranges_in_words():
    assert healthy_text(METRICS["policy/clip_fraction"]) == "0 to 0.3"
    assert healthy_text(METRICS["eval/perplexity_ratio"]) == "at most 1.3"
    assert healthy_text(METRICS["reward/std"]) == "at least 0.1"
    assert healthy_text(METRICS["invariant/first_kl"]) == "0"
    assert healthy_text(METRICS["train/lr"]) == ""
