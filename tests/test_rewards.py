"""A reward is its weighted parts, normalised where asked, and a part that is no use is named with its row."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from peftlab.errors import LabError, UserError
from peftlab.rewards.parts import Reward, RewardPart, user_function
from peftlab.rewards.sentiment import log_odds
from peftlab.rewards.spec import reward_of

ANSWERS = ["good", "bad film", "a", "the plot was dull"]
PROMPTS = ["I say "] * 4
finite = st.floats(-1e3, 1e3, width=32)


def length(prompts, completions, records):
    return [len(completion) for completion in completions]


def said(values):
    return lambda prompts, completions, records: values


def score(*parts: RewardPart):
    return Reward(parts)(PROMPTS, ANSWERS, [None] * 4)


@given(st.lists(finite, min_size=4, max_size=4), st.lists(finite, min_size=4, max_size=4), finite, finite)
def test_the_total_is_the_weighted_sum_of_the_parts_told(first, second, one, two):
    total, parts = score(RewardPart("first", said(first), one), RewardPart("second", said(second), two, gain=2, bias=1))
    assert_close(total, one * parts["first"] + two * parts["second"], rtol=1e-5, atol=1e-2)
    assert parts["first"].tolist() == first
    assert_close(parts["second"], torch.tensor(second) * 2 + 1)
    assert (total.dtype, total.device.type) == (torch.float32, "cpu")


def test_a_part_may_tell_several_named_ones():
    total, parts = score(RewardPart("all", said({"x": [1, 2, 3, 4], "y": torch.ones(4)}), weight=0.5))
    assert list(parts) == ["x", "y"]
    assert total.tolist() == [1, 1.5, 2, 2.5]


@given(st.lists(st.integers(-1000, 1000), min_size=4, max_size=4, unique=True), st.floats(0.1, 10), st.floats(-50, 50))
def test_normalising_gives_mean_0_and_variance_1_whatever_the_scale(values, scale, shift):
    raw = torch.tensor(values) * scale + shift
    reward = Reward((RewardPart("n", said(raw), 3.0, normalise=True), RewardPart("plain", said(raw))))
    _, parts = reward.normalise(PROMPTS, ANSWERS, [None] * 4)(PROMPTS, ANSWERS, [None] * 4)
    assert_close(parts["n"].mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
    assert_close(parts["n"].var(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert torch.equal(parts["plain"], raw.float()), "only where asked"


def test_normalising_a_constant_stays_finite():
    reward = Reward((RewardPart("c", said([2.0] * 4), normalise=True),)).normalise(PROMPTS, ANSWERS, [None] * 4)
    assert reward(PROMPTS, ANSWERS, [None] * 4)[0].abs().max() < 1e-3


def test_state_goes_through_a_checkpoint():
    reward = Reward((RewardPart("length", length, 2.0, normalise=True), RewardPart("one", said([1.0] * 4))))
    ready = reward.normalise(PROMPTS, ANSWERS, [None] * 4)
    again = reward.with_state(ready.state())
    assert again == ready != reward
    older = {f"once {name}": scale for name, scale in ready.state().items()}
    assert reward.with_state(older) == ready, "of a checkpoint in which a part had another name"
    assert torch.equal(again(PROMPTS, ANSWERS, [0] * 4)[0], ready(PROMPTS, ANSWERS, [0] * 4)[0])


@pytest.mark.parametrize(
    ("values", "words"),
    {
        "too few": ([1.0], ["rude", "4 completions", "(1,)"]),
        "too many": ([1.0] * 5, ["4 completions", "(5,)"]),
        "a column": ([[1.0]] * 4, ["(4, 1)"]),
        "a scalar": (1.0, ["shape ()"]),
        "not a number": ([1.0, 2.0, float("nan"), 4.0], ["nan", "completion 2", "'a'"]),
        "infinite": ([1.0, float("-inf"), 3.0, 4.0], ["-inf", "completion 1", "'bad film'"]),
        "text": (["good"] * 4, ["returned ['good', 'good', 'good', 'good']; return a number for each"]),
        "nothing": (None, ["returned None; return a number for each"]),
        "ragged": ([[1], [1, 2], 3, 4], ["returned [[1], [1, 2], 3, 4]; return a number for each"]),
        "a named part": ({"mean": [1.0] * 3}, ["mean", "(3,)"]),
    }.values(),
)
def test_what_is_not_a_number_a_completion_is_named(values, words):
    with pytest.raises(LabError) as told:
        score(RewardPart("rude", said(values)))
    assert all(word in str(told.value) for word in words)


def test_the_users_function_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_house_rewards.py").write_text("def short(p, c, r):\n    return [1.0] * len(c)\n\nx = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert user_function("my_house_rewards:short")([], ["a"], []) == [1.0]
    for path, words in {
        "my_house_rewards": "expected module:function",
        ":short": "expected module:function",
        "my_house_rewards:long": "has no 'long'$",
        "my_house_rewards:shrot": r"has no 'shrot'; did you mean short\?",
        "my_house_rewards:x": "not a function",
        "my_house_rewards.py:short": "write the module as Python imports it, my_house_rewards:short$",
        "./my_house_rewards.py:short": "as Python imports it, my_house_rewards:short$",
        "lab/rewards:short": r"as Python imports it, lab\.rewards:short$",
        f"{tmp_path}/my_house_rewards.py:short": "as Python imports it, my_house_rewards:short$",
        "nowhere_to_be_found:f": "no module 'nowhere_to_be_found'",
    }.items():
        with pytest.raises(UserError, match=words):
            user_function(path)


def test_what_a_users_function_raises_is_a_line_that_names_its_own(tmp_path, monkeypatch):
    code = "def f(p, c, r):\n    return g(c)\n\n\ndef g(c):\n    return c[0].none\n\n\ndef two(p, c):\n    return c\n"
    (tmp_path / "raising_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LabError, match=r"raising_rewards:f: raising_rewards.py, line 6: AttributeError: .*none"):
        user_function("raising_rewards:f")([], ["a"], [])
    with pytest.raises(LabError, match=r"raising_rewards:two: takes \(prompts, completions, records\); TypeError: two"):
        user_function("raising_rewards:two")([], ["a"], [])
    with pytest.raises(UserError, match="raising_rewards is a module; name a function of it, raising_rewards:FUNCTION"):
        reward_of("raising_rewards", "")


@pytest.mark.parametrize("text", ["def f(:\n", "import not_installed_anywhere\n", "1 / 0\n"])
def test_a_users_module_that_does_not_import_is_one_message(tmp_path, monkeypatch, text):
    name = f"broken_rewards_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"{name}:f"):
        user_function(f"{name}:f")


def test_log_odds_of_the_wanted_sentiment_read_prompt_and_completion():
    class Classifier:
        name, labels = "words", ["negative", "positive"]

        def logits(self, texts):
            return torch.tensor([[float(t.count("bad")), float(t.count("good"))] for t in texts])

    prompts, completions = ["good ", "bad ", "so "], ["good", "good", "bad bad"]
    positive = log_odds(Classifier(), "positive")(prompts, completions, [None] * 3)
    assert positive.tolist() == [2.0, 0.0, -2.0]
    assert torch.equal(log_odds(Classifier(), "negative")(prompts, completions, [None] * 3), -positive)


@pytest.mark.parametrize("labels", [["positive", "negative"], ["up", "down"], ["negative", "mixed", "positive"]])
def test_the_wanted_class_goes_by_its_name(labels):
    class Classifier:
        name = "mine"

        def logits(self, texts):
            return torch.tensor([[3.0, 1.0]] * len(texts))

    classifier = Classifier()
    classifier.labels = labels
    if labels[0] == "positive":
        assert log_odds(classifier, "positive")(["a"], ["b"], [None]).tolist() == [2.0]
    else:
        with pytest.raises(UserError, match="mine"):
            log_odds(classifier, "positive")
