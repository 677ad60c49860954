"""Task explanation: the reason of a label, by a question that asks for it, and graded by the rubric."""

from __future__ import annotations

import pytest
import tiny
from task_jobs import go, keys, means

from peftlab.data.explanations import prompt_of
from peftlab.errors import UserError
from peftlab.models.adapter_files import load_stack
from peftlab.recipes.launch import launch
from peftlab.runs.atomic import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
RUBRIC = {f"rubric/{part}" for part in ("label", "explained", "evidence", "length", "repetition", "ended", "all")}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop, and reviews that ask for the reason of a label: to train on and, of other texts, to evaluate by."""
    root = tmp_path_factory.mktemp("explanation")
    shop = tiny.workshop(root)
    for name, count in (("reviews", 8), ("unseen", 6)):
        rows = [{"prompt": prompt_of(row["text"]), "label": row["label"]} for row in tiny.reviews(count, seed=count)]
        shop[name] = tiny.write_rows(root / f"{name}.jsonl", rows)
    return shop


def test_an_explanation_has_no_class_that_a_classifier_could_look_for(shop, tmp_path):
    pairs = ["task=explanation", "train_data={reviews}", "eval_data={unseen}", "reward=imdb-sentiment"]
    with pytest.raises(UserError, match="which looks for the class that `want` names; task explanation has none"):
        launch("ppo", None, keys(shop, "ppo", *pairs), tmp_path, "run")


def test_ppo_explains_by_the_rubric(shop, tmp_path):
    """On the bundled model, whose context holds the question."""
    pairs = ["model=tiny-gpt2", "task=explanation", "train_data={reviews}", "eval_data={unseen}", "max_new_tokens=12"]
    pairs += ["prompts_per_step=4"]
    summary, run = go("ppo", keys(shop, "ppo", *pairs), tmp_path)
    for figures, side in ((summary["baseline"], "before"), (summary["metrics"], "after")):
        assert figures.keys() >= RUBRIC and "eval/judge" not in figures
        assert not any(name.startswith("eval/part/") for name in figures), "told once"
        assert figures["eval/reward"] == pytest.approx(sum(figures[name] for name in RUBRIC - {"rubric/all"}), rel=1e-5)
        shown = means(run, side)
        assert all(shown[name] == pytest.approx(figures[name]) for name in RUBRIC)
    assert summary["intervals"].keys() == RUBRIC | {"eval/kl", "eval/reward"}
    rows = list(read_rows(run / "rollouts.jsonl"))
    assert all(row["prompt"].endswith("Answer:") for row in rows), "whole"
    cut = [row for row in rows if len(row["tokens"]) == 12]
    for row in cut:  # the penalty of task explanation: no EOS came
        paid = sum(token["reward"] + 0.1 * token["kl"] for token in row["tokens"])
        assert paid == pytest.approx(row["score"] - 1.0, abs=1e-4)
    assert cut
    assert load_stack(str(run), device="cpu")[1].extra == {"recipe": "ppo", "task": "explanation"}


def test_dpo_is_evaluated_by_the_rubric(shop, tmp_path):
    summary, run = go("dpo", keys(shop, "dpo", "task=explanation", "prompts={unseen}", "model=tiny-gpt2"), tmp_path)
    assert means(run, "after").keys() == RUBRIC | {"kl"}
    assert summary["metrics"].keys() >= RUBRIC and "eval/reward" not in summary["metrics"]
