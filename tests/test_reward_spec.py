"""A reward as one line: parts and weights are read as they are written, and each names what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlab.data.records import Prompt
from peftlab.errors import UserError
from peftlab.models.adapter_files import load_stack
from peftlab.models.adapters import Lora
from peftlab.models.backbone import load_backbone
from peftlab.models.classifier import TextClassifier
from peftlab.models.reward_model import RewardModel, RewardNet
from peftlab.models.roles import Roles
from peftlab.models.stacks import Stack, stack_over
from peftlab.rewards.spec import Term, reward_of, terms, with_runs

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = st.sampled_from(["imdb-sentiment", "runs/a.b/adapter", "rubric:length", "my_rewards:praise", "./x y"])
PROMPTS, ANSWERS = ["the film"] * 2, [" is good .", " is bad , bad , bad"]
RECORDS = [Prompt("0", "the film", 1), Prompt("1", "the film", 0)]


@given(st.lists(st.tuples(st.floats(-100, 100), NAMES), min_size=1, max_size=5), st.sampled_from(["+", " + ", "  +"]))
def test_a_line_is_read_as_it_is_written(parts, plus):
    assert terms(plus.join(f"{weight!r}*{name}" for weight, name in parts)) == [Term(*part) for part in parts]
    assert terms(plus.join(name for _, name in parts)) == [Term(1.0, name) for _, name in parts]


ODD_NAMES = st.sampled_from(["a+b", "2*c", " d", "e 'f'", 'g"h"', "p(i)", "p(j", "k)", "p()"])


@given(st.lists(st.tuples(st.floats(-100, 100), NAMES | ODD_NAMES, st.booleans()), min_size=1))
def test_a_part_is_spelled_as_it_is_read(parts):
    found = [Term(*part) for part in parts]
    assert terms(" + ".join(map(str, found))) == found


@pytest.mark.parametrize("line", ["p(a)", "p( a )", " p(a) ", "p('a')", 'p( "a" )'])
def test_a_probability_is_of_the_name_inside(line):
    assert terms(line) == [Term(1.0, "a", bounded=True)]
    assert terms(f"-2 * {line}+b") == [Term(-2.0, "a", bounded=True), Term(1.0, "b")]


def test_runs_in_a_line_go_by_their_names(tmp_path, monkeypatch):
    """Only parts that are models: not the rubric's, nor a function's module. A line without a run stays as it is."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "rubric", "length", "imdb-sentiment"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
    assert with_runs("1e16*mine + a") == "1e16*runs/mine + a"
    assert with_runs("0.5*mine+ rubric:length + 'a+b'") == '0.5*runs/mine + rubric:length + "a+b"'
    assert with_runs("p(mine) + 'p(mine)'") == "p(runs/mine) + \"p(mine)\""
    for line in ("imdb-sentiment +2*rubric:length", "mine:score", "'runs/mine'", "./mine"):
        assert with_runs(line) == line


@pytest.mark.parametrize("line", ["a + ", "+ a", "nan*a", "1e*a", "2*3*a", "*a", "2*"])
def test_what_is_no_line_is_refused(line):
    with pytest.raises(UserError, match="WEIGHT\\*NAME"):
        terms(line)


def test_parts_of_the_rubric_and_functions_add_up(tmp_path, monkeypatch):
    (tmp_path / "my_line.py").write_text("def praise(p, c, r):\n    return [float('good' in text) for text in c]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = reward_of("2*rubric:ended + -1*rubric:repetition + my_line:praise", "positive")
    total, parts = reward(PROMPTS, ANSWERS, RECORDS)
    assert {name: values.tolist() for name, values in parts.items()} == {
        "ended": [1, 0], "repetition": [1, 1], "praise": [1, 0]
    }
    assert total.tolist() == [2 - 1 + 1, -1]
    twice = reward_of("rubric:ended + rubric:ended", "positive")
    assert list(twice(PROMPTS, ANSWERS, RECORDS)[1]) == ["ended", "ended-2"]
    styled = reward_of("rubric:style", "positive", ["good", "!bad"])
    assert styled(PROMPTS, ANSWERS, RECORDS)[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "nothing to optimise"),
        ("rubric:charm", "rubric:charm.*label, explained"),
        ("rubric:style", "no pattern"),
        ("tiny-gpt2", "not a classifier"),
        ("nowhere:f", "nowhere"),
        ("p(rubric:length)", "p\\(rubric:length\\) is a probability.*write rubric:length"),
        ("p(nowhere:f)", "p\\(nowhere:f\\) is a probability.*write nowhere:f"),
        ("p(tiny-gpt2)", "not a classifier"),
        ("0.5*p(tiny-gpt2", "p\\(tiny-gpt2 lacks its closing bracket; write p\\(tiny-gpt2\\)"),
    ],
)
def test_a_part_that_is_none_is_refused(line, words):
    with pytest.raises(UserError, match=words):
        reward_of(line, "positive", device="cpu")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mine", "reward: mine is a module; name a function of it, mine:FUNCTION"),
        ("mine.py", "reward: mine.py is a module; name a function of it, mine:FUNCTION"),
        ("./mine.py", "reward: ./mine.py is a module; name a function of it, mine:FUNCTION"),
        ("mine.kind", "reward: mine.kind is a function of a module; write a colon before it, mine:kind"),
        ("lab.mine", "reward: lab.mine is a module; name a function of it, lab.mine:FUNCTION"),
        ("lab/mine", "reward: lab/mine is a module; name a function of it, lab.mine:FUNCTION"),
        ("lab/mine.py", "reward: lab/mine.py is a module; name a function of it, lab.mine:FUNCTION"),
        ("lab.mine.kind", "reward: lab.mine.kind is a function of a module; write a colon before it, lab.mine:kind"),
    ],
)
def test_a_function_that_is_spelled_another_way_is_told_how(name, told, tmp_path, monkeypatch):
    """What may be a model's name is left alone, as that of a folder with a dot in it."""
    monkeypatch.chdir(tmp_path)
    for file in ("mine.py", "lab/mine.py"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("def kind(prompts, completions, records):\n    return [1.0] * len(completions)\n")
    with pytest.raises(UserError) as refused:
        terms(f"imdb-sentiment + 0.5*{name}")
    assert str(refused.value) == told
    Path("mine.v2").mkdir()
    assert [term.is_model for term in terms("mine.v2 + theirs.v2 + OWNER/mine.kind")] == [True] * 3


def reward_folder(base: Path, folder: Path, seed: int = 1) -> Path:
    """A reward model with random weights on `base`."""
    backbone, under = load_stack(str(base), device="cpu")
    net = RewardNet.fresh(backbone, Lora(r=4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.learned(0).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    stack = stack_over(str(base), under, backbone.tokenizer)
    return RewardModel("mine", net, backbone.tokenizer, 64).save(folder, stack)


def test_a_reward_model_joins_the_policy_on_one_base(tmp_path):
    base = tiny.causal_folder(tmp_path / "gpt2")
    folder = reward_folder(base, tmp_path / "judge-of-style" / "adapter")
    backbone, under = load_stack(str(base), device="cpu")
    weight = backbone.model.transformer.h[0].attn.c_attn.weight
    roles = Roles(backbone, Lora(r=2))
    ground = (replace(backbone, model=roles.model), stack_over(str(base), under, backbone.tokenizer))
    reward = reward_of(str(folder), "positive", device="cpu", ground=ground)
    alone = reward_of(str(folder), "positive", device="cpu")
    ours, theirs = (one(PROMPTS, ANSWERS, RECORDS) for one in (reward, alone))
    assert list(ours[1]) == ["judge-of-style"] and torch.equal(ours[0], theirs[0])
    shared = roles.model.base_model.model.transformer.h[0].attn.c_attn
    assert shared.base_layer.weight.data_ptr() == weight.data_ptr()
    assert {"policy", "member-0"} <= set(shared.lora_A)
    sizes = roles.bytes_per_role()
    assert sizes["reward"] > 0 and sizes["base"] == Roles(load_backbone(str(base), device="cpu"), Lora(r=2)
                                                          ).bytes_per_role()["base"]
    assert all(p.requires_grad == ("policy" in n) for n, p in roles.model.named_parameters() if "lora_" in n)
    ids, mask = torch.tensor([[110, 111, 112]]), torch.ones(1, 3, dtype=torch.bool)
    assert torch.equal(roles.policy(ids, mask, 2), roles.reference(ids, mask, 2)), "scoring left the policy in charge"


def test_no_reward_model_goes_by_the_name_of_the_sum(tmp_path):
    """A run of `peftlab reward` is called reward, and so is the stage of a demo."""
    base = tiny.causal_folder(tmp_path / "gpt2")
    folders = [reward_folder(base, tmp_path / name / "adapter") for name in ("reward", "demo/reward", "reward-tiny")]
    line = " + ".join(map(str, folders))
    total, parts = reward_of(line, "positive", device="cpu")(PROMPTS, ANSWERS, RECORDS)
    assert list(parts) == ["reward_model", "reward_model-2", "reward-tiny"]
    assert torch.equal(total, sum(parts.values()))


def test_no_part_goes_by_the_name_of_the_sum_nor_by_that_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("sums.py").write_text("def reward(p, c, r):\n    return [1.0] * len(c)\n")
    base = tiny.causal_folder(tmp_path / "gpt2")
    folders = [reward_folder(base, tmp_path / name) for name in ("runs/a", "other/a", "runs/a-2")]
    line = " + ".join(["sums:reward", "sums:reward", *map(str, folders)])
    reward = reward_of(line, "positive", device="cpu")
    total, parts = reward(PROMPTS, ANSWERS, RECORDS)
    assert list(parts) == ["reward_function", "reward_function-2", "a", "a-2", "a-2-2"]
    assert torch.equal(total, sum(parts.values()))
    assert reward.with_state(reward.state()) == reward


def test_a_classifiers_probability_is_bounded_where_its_log_odds_are_not():
    both = reward_of("p(imdb-sentiment) + imdb-sentiment", "negative", device="cpu")
    _, parts = both(PROMPTS, ANSWERS, RECORDS)
    classifier = TextClassifier.load("imdb-sentiment", device="cpu")
    table = classifier.probabilities([p + c for p, c in zip(PROMPTS, ANSWERS, strict=True)])
    assert list(parts) == ["p-imdb-sentiment", "imdb-sentiment"]
    torch.testing.assert_close(parts["p-imdb-sentiment"], table[:, classifier.labels.index("negative")])
    torch.testing.assert_close(parts["p-imdb-sentiment"], parts["imdb-sentiment"].sigmoid())
    assert all(part.normalise for part in both.parts)


def test_a_reward_model_has_no_probability(tmp_path):
    folder = reward_folder(tiny.causal_folder(tmp_path / "gpt2"), tmp_path / "mine")
    with pytest.raises(UserError, match=f"is a probability, which a sentiment classifier has; write {folder}"):
        reward_of(f"p({folder})", "positive", device="cpu")


def test_a_second_reward_model_of_a_ground_brings_its_own(tmp_path):
    base = tiny.causal_folder(tmp_path / "gpt2")
    folders = [reward_folder(base, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    backbone, under = load_stack(str(base), device="cpu")
    roles = Roles(backbone, Lora(r=2))
    ground = (replace(backbone, model=roles.model), stack_over(str(base), under, backbone.tokenizer))
    line = " + ".join(map(str, folders))
    both, apart = (reward_of(line, "positive", device="cpu", ground=one) for one in (ground, None))
    assert torch.equal(both(PROMPTS, ANSWERS, RECORDS)[0], apart(PROMPTS, ANSWERS, RECORDS)[0])


def test_a_policy_of_fewer_layers_than_the_reward_that_joined_it(tmp_path):
    base = tiny.causal_folder(tmp_path / "gpt2")
    folder = reward_folder(base, tmp_path / "mine")
    backbone, under = load_stack(str(base), device="cpu")
    roles = Roles(backbone, Lora(r=2, targets=["c_attn"]))
    RewardModel.load(
        str(folder), "cpu", (replace(backbone, model=roles.model), stack_over(str(base), under, backbone.tokenizer))
    )
    before = {name: weight.clone() for name, weight in roles.twin.named_parameters()}
    roles.refresh()
    assert all(torch.equal(before[name], weight) for name, weight in roles.twin.named_parameters()), "B is still 0"


def test_a_reward_model_of_another_ground_brings_its_own(tmp_path):
    base = tiny.causal_folder(tmp_path / "gpt2")
    folder = reward_folder(base, tmp_path / "mine")
    backbone = load_backbone(str(base), device="cpu")
    over = Stack("causal", str(base), backbone.fingerprint, (folder,))  # an adapter lies merged under this policy
    model = RewardModel.load(str(folder), "cpu", (backbone, over))
    assert model.net.model is not backbone.model and not hasattr(backbone.model, "peft_config")
