"""Tasks: what each makes of a config, and real runs of each; a step's passes, and its exact KL."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import test_ppo
import test_rloo
import tiny
import torch
from torch.distributions import Categorical, kl_divergence

from peftlab.config import load_config
from peftlab.data.explanations import prompt_of
from peftlab.data.records import Prompt
from peftlab.errors import UserError
from peftlab.evaluation.policy import Side, evaluate_side
from peftlab.models.adapters import load_stack
from peftlab.recipes import RECIPES, load
from peftlab.recipes.launch import dry_run, launch
from peftlab.recipes.tasks import TASKS
from peftlab.rl import trainer as trainer_module
from peftlab.rl.rollout import FirstStep
from peftlab.rl.trainer import PolicyTrainer
from peftlab.runs.atomic import read_rows
from peftlab.runs.metrics import metric
from peftlab.sampling.sampler import Decoding

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
TRAINERS = ("ppo", "rloo", "dpo")
REWARDS = '''
def letters(prompts, completions, records):
    """How often e stands in an answer, and how short it is."""
    return {"e": [c.count("e") / 4 for c in completions], "short": [-len(c) / 40 for c in completions]}


def of_rows(prompts, completions, records):
    """1 where a prompt is the whole of its row's."""
    return [float(prompt == record.prompt) for prompt, record in zip(prompts, records)]
'''
RUBRIC = {f"rubric/{part}" for part in ("label", "explained", "evidence", "length", "repetition", "ended", "all")}
LONG = " ".join(["the plot was dull and the film was bad"] * 12)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop, a judge, rewards of one's own, prompts of one's own, and reviews with the question of a label."""
    root = tmp_path_factory.mktemp("tasks")
    shop = tiny.workshop(root) | {"root": str(root)}
    launch("classify", None, tiny.overrides(shop, "classify"), root / "runs", "judge")
    (root / "my_tasks.py").write_text(REWARDS)
    asked = [{"id": f"q{i}", "prompt": row["text"]} for i, row in enumerate(tiny.reviews(12, seed=3))]
    shop["asked"] = tiny.write_rows(root / "asked.jsonl", asked)
    shop["long"] = tiny.write_rows(root / "long.jsonl", [*asked, *({"id": i, "prompt": LONG} for i in "lm")])
    shop["endless"] = tiny.write_rows(root / "endless.jsonl", [{"prompt": LONG}])
    for name, count in (("reviews", 8), ("unseen", 6)):
        rows = [{"prompt": prompt_of(row["text"]), "label": row["label"]} for row in tiny.reviews(count, seed=count)]
        shop[name] = tiny.write_rows(root / f"{name}.jsonl", rows)
    return shop | {"judge": str(root / "runs" / "judge")}


@pytest.fixture(autouse=True)
def at_home(shop, monkeypatch) -> None:
    """Rewards are looked up in the working directory."""
    monkeypatch.chdir(shop["root"])


def keys(shop: dict[str, str], verb: str, *pairs: str) -> list[str]:
    """A job of seconds in this workshop, its prompts from the pairs alone."""
    own = [pair for pair in tiny.overrides(shop, verb) if not pair.startswith(("train_data", "eval_data", "prompts="))]
    if verb == "dpo":
        own += [pair.format(**shop) for pair in ("train_data={preferences}", "eval_data={preferences_test}")]
    return [*own, *(pair.format(**shop) for pair in pairs)]


def custom(shop: dict[str, str], verb: str, *pairs: str, prompts: str = "asked") -> list[str]:
    """The same with prompts and a reward of one's own."""
    data = ["prompts"] if verb == "dpo" else ["train_data", "eval_data"]
    reward = [] if verb == "dpo" else ["reward=my_tasks:letters"]
    return keys(shop, verb, "task=custom", *(f"{key}={{{prompts}}}" for key in data), *reward, *pairs)


def go(verb: str, given: list[str], runs: Path) -> tuple[dict, Path]:
    """A finished run's summary and folder; every name in it is a metric's."""
    summary = launch(verb, None, given, runs, verb)
    names = summary["metrics"].keys() | summary["baseline"].keys() | summary["intervals"].keys()
    names |= {n for row in read_rows(runs / verb / "metrics.jsonl") for n in row.keys() - {"step", "time"}}
    assert all(metric(name) for name in names)
    assert summary["baseline"].keys() <= summary["metrics"].keys() and summary["status"] == "done"
    assert "</html>" in (runs / verb / "report.html").read_text()
    return summary, runs / verb


def means(run: Path, side: str) -> dict[str, float]:
    """The mean of each number in the samples of one side."""
    rows = [row for row in read_rows(run / "samples.jsonl") if row["side"] == side]
    return {name: float(np.mean([row[name] for row in rows])) for name, v in rows[0].items() if isinstance(v, float)}


# What a task makes of a config


def test_a_key_has_its_tasks_value_until_a_config_gives_one():
    base, asked = (load_config(load("ppo").CONFIG, None, pairs) for pairs in ([], ["task=explanation"]))
    assert (base.task, base.want, base.judge, base.prompt_tokens) == ("continuation", "positive", "imdb-judge", (2, 8))
    assert (asked.want, asked.judge, asked.prompt_tokens, asked.eos_penalty) == ("", "", (0, 0), 1.0)
    assert asked.train_data != asked.eval_data and asked.reward.count("rubric:") == 6
    given = load_config(load("ppo").CONFIG, None, ["task=explanation", "max_new_tokens=9", "reward=rubric:label"])
    assert (given.max_new_tokens, given.reward) == (9, "rubric:label")
    assert given.with_(steps=3).max_new_tokens == 9


@pytest.mark.parametrize("verb", TRAINERS)
@pytest.mark.parametrize("name", TASKS)
def test_what_a_task_says_is_about_keys_that_recipes_have(name, verb):
    task, config = TASKS[name], load(verb).CONFIG
    said = task.keys.keys() | task.idle.keys() | task.needs.keys()
    elsewhere = {"eos_penalty", "reward", "train", "test"}  # of ppo and rloo, or called otherwise
    assert said - elsewhere <= config.model_fields.keys()
    assert set(config.of_task(dict.fromkeys(said))) <= config.model_fields.keys()
    assert set(task.idle) <= set(task.keys)


@pytest.mark.parametrize("verb", TRAINERS)
@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["task=explain"], "task: there are continuation, explanation, custom, not 'explain'"),
        (["task=[1]"], "task: "),
        (["task=explanation", "want=negative"], "want: does nothing in task explanation"),
        (["task=explanation", "judge=imdb-judge"], "judge: does nothing in task explanation"),
        (["task=explanation", "prompt_tokens=[2,8]"], "prompt_tokens: does nothing in task explanation"),
        (["want="], "want: give positive or negative"),
        (["judge="], "judge: give the classifier"),
        (["prompt_tokens=[0,4]"], "prompt_tokens: expected 1 <= shortest"),
        (["prompt_tokens=[5,2]"], "prompt_tokens: expected 1 <= shortest"),
    ],
)
def test_a_key_that_does_nothing_or_lacks_is_refused_by_name(verb, pairs, words):
    with pytest.raises(UserError, match=re.escape(words)):
        load_config(load(verb).CONFIG, None, pairs)


@pytest.mark.parametrize(
    ("verb", "lacking", "words"),
    [
        ("ppo", "train_data", "train_data: task custom has no prompts"),
        ("rloo", "eval_data", "eval_data: task custom has no prompts of its own.*other than those trained on"),
        ("rloo", "reward", "reward: task custom has none of its own"),
        ("dpo", "prompts", "prompts: task custom has no prompts of its own"),
    ],
)
def test_a_custom_task_asks_for_what_it_lacks(shop, verb, lacking, words):
    pairs = [pair for pair in custom(shop, verb) if not pair.startswith(f"{lacking}=")]
    with pytest.raises(UserError, match=words):
        load_config(load(verb).CONFIG, None, pairs)


@pytest.mark.parametrize(
    ("verb", "pairs", "words"),
    [
        ("ppo", ["judge={judge}"], "want: give positive or negative, which the judge looks for"),
        ("ppo", ["want=positive"], "want: neither the reward nor a judge"),
        ("dpo", ["want=positive"], "want: only a judge"),
        ("rloo", ["reward={judge}"], "reward: .*classifier.*give want=positive"),
        ("rloo", ["reward={judge}", "judge={judge}", "want=positive"], "judge: .*is the reward too"),
        ("ppo", ["max_new_tokens=96"], "max_new_tokens: .*context"),
    ],
)
def test_what_cannot_work_is_one_message_before_the_training(shop, tmp_path, verb, pairs, words):
    with pytest.raises(UserError, match=words):
        launch(verb, None, custom(shop, verb, *pairs), tmp_path, "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_explanation_has_no_class_that_a_classifier_could_look_for(shop, tmp_path):
    given = keys(shop, "ppo", "task=explanation", "train_data={reviews}", "eval_data={unseen}", "reward={judge}")
    with pytest.raises(UserError, match="which looks for the class that `want` names; task explanation has none"):
        launch("ppo", None, given, tmp_path, "run")


# Runs


def test_ppo_explains_by_the_rubric(shop, tmp_path):
    """On the bundled model, whose context holds the question."""
    pairs = ["model=tiny-gpt2", "task=explanation", "train_data={reviews}", "eval_data={unseen}", "max_new_tokens=12"]
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


@pytest.mark.parametrize("verb", ["ppo", "rloo"])
def test_a_policy_learns_from_ones_own_prompts_and_reward(shop, tmp_path, verb):
    summary, run = go(verb, custom(shop, verb, "steps=3", "reward=my_tasks:letters + 2*my_tasks:of_rows"), tmp_path)
    for figures, side in ((summary["baseline"], "before"), (summary["metrics"], "after")):
        assert "eval/judge" not in figures and "judge" not in means(run, side)
        parts = {name: figures[f"eval/part/{name}"] for name in ("e", "short", "of_rows")}
        assert parts["of_rows"] == 1.0, "prompts are whole"
        assert figures["eval/reward"] == pytest.approx(parts["e"] + parts["short"] + 2, abs=1e-5)
        answers = [row["completion"] for row in read_rows(run / "samples.jsonl") if row["side"] == side]
        assert parts["e"] == pytest.approx(sum(answer.count("e") for answer in answers) / 4 / len(answers))
    assert summary["baseline"]["eval/kl"] == 0.0 < summary["metrics"]["eval/kl"]
    low, high = summary["intervals"]["eval/part/e"]
    assert low <= summary["metrics"]["eval/part/e"] <= high


def test_a_reward_of_one_part_is_told_once(shop, tmp_path):
    summary, _ = go("rloo", custom(shop, "rloo", "reward=my_tasks:of_rows"), tmp_path)
    assert summary["metrics"]["eval/reward"] == 1.0
    assert not any(name.startswith("eval/part/") for name in summary["metrics"])


def test_a_custom_task_may_have_a_judge(shop, tmp_path):
    summary, run = go("ppo", custom(shop, "ppo", "want=negative", "judge={judge}"), tmp_path)
    assert 0 < summary["metrics"]["eval/judge"] < 1
    assert means(run, "after")["judge"] == pytest.approx(summary["metrics"]["eval/judge"])
    assert load_stack(str(run), device="cpu")[1].extra["want"] == "negative"


@pytest.mark.parametrize(("pairs", "measured"), [
    (["task=custom", "prompts={asked}"], set()),
    (["task=explanation", "prompts={unseen}", "model=tiny-gpt2"], RUBRIC),
])
def test_dpo_evaluates_by_task(shop, tmp_path, pairs, measured):
    summary, run = go("dpo", keys(shop, "dpo", *pairs), tmp_path)
    assert means(run, "after").keys() == measured | {"kl"}
    assert measured <= summary["metrics"].keys() and "eval/reward" not in summary["metrics"]


def test_prompts_that_leave_no_room_are_left_out_and_told(shop, tmp_path, capsys):
    """Two of fourteen do not fit into a context of 96 tokens less 8 for the answer."""
    _, run = go("rloo", custom(shop, "rloo", "eval_prompts=14", prompts="long"), tmp_path)
    told = [row for row in read_rows(run / "events.jsonl") if row["kind"] == "prompts_left_out"]
    assert [(row["rows"], row["longest"]) for row in told] == [(2, 88), (2, 88)]
    assert capsys.readouterr().err.count("2 of 14 prompts are left out: longer than 88 tokens") == 2
    asked = Counter(row["prompt_id"] for row in read_rows(run / "samples.jsonl"))
    assert asked == {f"q{i}": 2 for i in range(12)}
    plan = dry_run("rloo", None, custom(shop, "rloo", prompts="long"))
    assert plan["prompts"] == 12 and plan["bytes of one pass's logits"] == 12 * 8 * 320 * 4


def test_prompts_of_which_none_fits_are_refused(shop, tmp_path):
    with pytest.raises(UserError, match="every prompt is longer than 88 tokens"):
        launch("ppo", None, custom(shop, "ppo", prompts="endless"), tmp_path, "run")


def test_an_interval_draws_the_rows_of_one_prompt_together():
    """Two prompts of three alike answers are two cases, not six: one, the other or both are drawn."""
    columns = {"nll": np.ones(6), "entropy": np.ones(6), "lengths": np.ones(6), "ended": np.ones(6)}
    kl = np.array([0.0, 0, 0, 1, 1, 1])
    two, six = (
        Side(["a"] * 6, kl=kl, measured={"eval/judge": kl}, clusters=of, **columns).intervals()
        for of in (np.array(list("pppqqq")), None)
    )
    assert two == {"eval/judge": (0.0, 1.0), "eval/kl": (0.0, 1.0)}
    assert 0 < six["eval/kl"][0] < six["eval/kl"][1] < 1


@pytest.mark.parametrize(("prompts", "clustered"), [("abcdef", False), ("aabbcc", True), ("aaaaaa", False)])
def test_prompts_that_repeat_are_clusters_where_there_are_several(tiny_causal, prompts, clustered):
    learner = test_rloo.trainer(tiny_causal)
    records = [Prompt(str(i), text) for i, text in enumerate(prompts)]
    token_ids, nothing = [[3, 4]] * 6, lambda prompts, completions, records: {}
    side = evaluate_side(learner.roles, None, token_ids, prompts, records, nothing, Decoding(4), seed=0)
    assert (side.clusters is not None) == clustered
    low, high = side.intervals()["eval/kl"]
    assert low == high == 0.0, "the reference itself"


EXAMPLE = re.compile(r"<!-- runs: task custom -->\n+```sh\n(.*?)```", re.DOTALL)
PAGES = {page: EXAMPLE.findall((ROOT / page).read_text(encoding="utf-8")) for page in ("README.md", "docs/ppo.md")}


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's example")
@pytest.mark.parametrize("example", sorted({example for found in PAGES.values() for example in found}))
def test_the_example_of_a_custom_task_runs_as_it_is_printed(tmp_path, example):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euc", example], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "personal" / "summary.json").read_text())
    assert summary["metrics"]["eval/reward"] > summary["baseline"]["eval/reward"] + 0.2
    assert len(list(read_rows(tmp_path / "runs" / "personal" / "samples.jsonl"))) == 2 * 12


def test_there_is_an_example():
    assert PAGES["docs/ppo.md"]


# A step of many tokens goes through the model in passes


def moved(learner: PolicyTrainer) -> PolicyTrainer:
    """The same with a policy that has left its reference and ends its answers, and a critic that says something."""
    for name, parameter in learner.roles.policy_parameters().items():
        torch.nn.init.normal_(parameter, std=0.1 if "lora_B" in name else 0.3)
    if learner.roles.head is not None:
        torch.nn.init.normal_(learner.roles.head.linear.weight, std=0.3)
    learner.roles.refresh()
    learner.first = FirstStep(0.0, 0.0, 1.0)
    return learner


def gradient_of(learner: PolicyTrainer, tokens: int, patch: pytest.MonkeyPatch) -> tuple[torch.Tensor, dict, int]:
    """The first minibatch's gradient, its figures, and how many passes it took, at most `tokens` in each."""
    made, backward = [], PolicyTrainer.backward

    def counting(self, rollout, rows, loss_of, *held):
        passes = []
        figures = backward(self, rollout, rows, lambda part: (passes.append(len(part)), loss_of(part))[1], *held)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        made.append((torch.cat([p.grad.flatten() for p in parameters]).double(), figures, len(passes)))
        return figures

    with patch.context() as patched:
        patched.setattr(trainer_module, "TOKENS_PER_PASS", tokens)
        patched.setattr(PolicyTrainer, "backward", counting)
        rollout, _, _ = moved(learner).step(test_ppo.PROMPTS.take(range(12)))
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 2, "passes of different shares"
    return made[0]


FREE = {"max_grad_norm": 1e9, "reward": test_rloo.w_words}
UNITS = {
    "ppo": lambda causal: test_ppo.trainer(causal, minibatch_size=12, **FREE),
    "ppo-adapter": lambda causal: test_ppo.trainer(causal, critic="adapter", minibatch_size=12, **FREE),
    "rloo-fixed": lambda causal: test_rloo.trainer(causal, **FREE),
    "rloo-sequence": lambda causal: test_rloo.trainer(causal, length_normaliser="sequence", **FREE),
}


@pytest.mark.parametrize("unit", UNITS)
def test_the_gradient_of_passes_is_that_of_the_whole(tiny_causal, monkeypatch, unit):
    gradients = {}
    for tokens in (10**6, 30):
        torch.manual_seed(1)
        gradients[tokens] = gradient_of(UNITS[unit](tiny_causal), tokens, monkeypatch)
    (whole, figures, once), (parts, summed, passes) = gradients.values()
    assert once == 1 and passes > 3 and whole.norm() > 1e-3
    assert float((parts - whole).norm() / whole.norm()) < 1e-6
    assert summed.keys() == figures.keys()
    for name, value in figures.items():
        assert float(summed[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name


# The exact KL


def warm(causal) -> PolicyTrainer:
    """A trainer that samples at another temperature than 1, and looks closely at every third step."""
    learner = moved(test_ppo.trainer(causal, record_every=3, epochs=1))
    learner.decoding = Decoding(max_new_tokens=8, temperature=0.7)
    return learner


@torch.no_grad()
def test_the_exact_kl_is_that_of_the_whole_vocabulary_in_steps_that_are_recorded(tiny_causal):
    learner = warm(tiny_causal)
    for step in range(1, 7):
        before = {name: weight.clone() for name, weight in learner.roles.state().items()}
        with torch.enable_grad():
            rollout, stats, _ = learner.step(test_ppo.PROMPTS)
        assert ("kl/exact" in stats) == (rollout.exact_kl is not None) == (step in (1, 3, 6))
        if rollout.exact_kl is None:
            continue
        after = {name: weight.clone() for name, weight in learner.roles.state().items()}
        learner.roles.load_state(before)
        keep = rollout.completion_ids.shape[1]
        policy, reference = (
            Categorical(logits=logits(rollout.ids, rollout.mask, keep).double() / 0.7)
            for logits in (learner.roles.policy, learner.roles.reference)
        )
        expected = kl_divergence(policy, reference) * rollout.completion_mask
        torch.testing.assert_close(rollout.exact_kl.double(), expected, atol=1e-5, rtol=1e-4)
        assert stats["kl/exact"] == pytest.approx(float(expected.sum(1).mean()), rel=1e-4)
        learner.roles.load_state(after)


def test_the_estimates_scatter_about_the_exact_kl(tiny_causal):
    """k1 and k3 summed over a completion have its mean, within four standard errors over 1,024 completions."""
    rollout = warm(tiny_causal).collect(test_ppo.PROMPTS.repeated(32))
    log_r = rollout.ref_logprobs - rollout.logprobs
    exact = rollout.exact_kl.sum(1)
    assert exact.mean() > 0.1
    for estimate in (-log_r, log_r.expm1() - log_r):
        error = (estimate * rollout.completion_mask).sum(1) - exact
        assert abs(error.mean()) < 4 * error.std() / len(error) ** 0.5


def test_recipes_with_a_task_are_those_of_a_policy():
    assert tuple(verb for verb in RECIPES if "task" in load(verb).CONFIG.model_fields) == TRAINERS
