"""What a task makes of a config."""

from __future__ import annotations

import re

import pytest

from peftlab.config import load_config
from peftlab.errors import UserError
from peftlab.recipes import RECIPES, load
from peftlab.recipes.tasks import TASKS

TRAINERS = ("ppo", "rloo", "dpo")


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
        (["task=explain"], "task: there are continuation, explanation, custom (did you mean explanation?), not"),
        (["task=cutom"], "task: there are continuation, explanation, custom (did you mean custom?), not 'cutom'"),
        (["task=poem"], "task: there are continuation, explanation, custom, not 'poem'"),
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


def test_recipes_with_a_task_are_those_of_a_policy():
    assert tuple(verb for verb in RECIPES if "task" in load(verb).CONFIG.model_fields) == TRAINERS
