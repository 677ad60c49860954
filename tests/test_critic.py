"""A critic that starts as the reward model: it says what the reward pays, learns apart from it, and resumes."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path

import pytest
import tiny
import torch

from peftlab.errors import Interrupted, UserError
from peftlab.models.adapter_files import load_stack
from peftlab.models.adapters import PolicyLora
from peftlab.models.reward_model import RewardModel, critic_start
from peftlab.models.roles import Roles
from peftlab.models.stacks import stack_over
from peftlab.recipes import ppo
from peftlab.recipes.launch import dry_run, launch
from peftlab.runs.atomic import read_rows
from peftlab.runs.rundir import RunDir

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS, ANSWERS = ["the film", "a plot was", "it"], [" is good .", " bad , bad", " great fun and not dull ."]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop; on an SFT run's model a reward model and an ensemble, on the bare base another reward model."""
    root = tmp_path_factory.mktemp("critic")
    shop = tiny.workshop(root) | {"runs": str(root / "runs")}
    train = ["max_steps=40", "batch_size=8", "lr=5e-3", "lora.r=6"]
    launch("sft", None, tiny.overrides(shop, "sft"), root / "runs", "under")
    shop["under"] = str(root / "runs" / "under")
    for name, pairs in {
        "paid": ["model={under}", *train],
        "three": ["model={under}", "members=3", "combine=mean"],
        "elsewhere": [],
    }.items():
        given = tiny.overrides(shop, "reward", *(pair.format(**shop) for pair in pairs))
        launch("reward", None, given, root / "runs", name)
        shop[name] = str(root / "runs" / name)
    return shop


def go(shop: dict[str, str], runs: Path, *pairs: str, resume: bool = False) -> Path:
    given = ["task=custom", "model={under}", "reward={paid}", "critic=reward", *pairs]
    launch("ppo", None, tiny.overrides(shop, "ppo", *(p.format(**shop) for p in given)), runs, "ppo", resume)
    return runs / "ppo"


def roles_of(shop: dict[str, str], name: str, weight: float = 1.0) -> tuple[Roles, RewardModel]:
    """Roles whose critic starts as a reward model, and that model beside them."""
    backbone, under = load_stack(shop["under"], device="cpu")
    ground = backbone, stack_over(shop["under"], under, backbone.tokenizer)
    roles = Roles(backbone, PolicyLora(r=4, alpha=8), "adapter", critic_start(shop[name], ground, weight))
    return roles, RewardModel.load(shop[name], "cpu")


def behind(roles: Roles, rows: list[list[int]]) -> torch.Tensor:
    """The critic's value behind the last token of each row, (N,)."""
    with torch.no_grad():
        return torch.cat([
            # A value is read before a token: one more token, and it is the value of all that stands before.
            roles.values(torch.tensor([[*row, 5]]), torch.ones(1, len(row) + 1, dtype=torch.bool), 1)[0]
            for row in rows
        ])


def test_the_value_behind_an_answer_is_what_the_reward_pays_for_it(shop):
    roles, model = roles_of(shop, "paid", weight=-2.5)
    paid = -2.5 * model.scores(PROMPTS, ANSWERS)
    assert paid.std() > 0.1
    torch.testing.assert_close(behind(roles, model.token_ids(PROMPTS, ANSWERS)), paid, atol=1e-4, rtol=1e-4)


def test_of_an_ensemble_the_first_member_starts_the_critic(shop):
    roles, model = roles_of(shop, "three")
    (gain, bias), scale = model.scale.members[0], model.scale
    first = scale.gain * (gain * model.logits(PROMPTS, ANSWERS)[:, 0] + bias) + scale.bias
    torch.testing.assert_close(behind(roles, model.token_ids(PROMPTS, ANSWERS)), first, atol=1e-4, rtol=1e-4)


def test_it_changes_neither_policy_nor_reference(shop):
    roles, _ = roles_of(shop, "paid")
    ids, mask = torch.randint(4, 320, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    roles.values(ids, mask, 8)
    assert torch.equal(roles.policy(ids, mask, 8), roles.reference(ids, mask, 8))
    learned = roles.policy_parameters().keys() | roles.critic_parameters().keys()
    assert {n for n, p in roles.model.named_parameters() if p.requires_grad} == {n for n in learned if "lora_" in n}


@pytest.fixture(scope="module")
def whole(shop, tmp_path_factory) -> Path:
    """A run that nothing stopped."""
    return go(shop, tmp_path_factory.mktemp("whole"), *LONG)


LONG = ["steps=4", "save_every=2", "critic_warmup=1", "prompts_per_step=32", "minibatch_size=16"]


def logged(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    return [{n: v for n, v in row.items() if not n.startswith("time")} for row in read_rows(run / "metrics.jsonl")]


def test_the_critic_learns_and_the_reward_does_not(shop, monkeypatch, tmp_path):
    built = []
    monkeypatch.setattr(ppo, "Roles", lambda *given: built.append(Roles(*given)) or built[-1])
    before = RewardModel.load(shop["paid"], "cpu").scores(PROMPTS, ANSWERS)
    go(shop, tmp_path, *LONG)
    start, model = roles_of(shop, "paid")
    assert torch.equal(model.scores(PROMPTS, ANSWERS), before)
    (roles,) = built
    ended, began = roles.critic_parameters(), start.critic_parameters()
    assert ended.keys() == began.keys() and not any(torch.equal(ended[name], began[name]) for name in ended)
    joined = [p for name, p in roles.model.named_parameters() if ".member-0." in name]
    assert joined and not any(p.requires_grad for p in joined)


def test_a_stopped_run_resumes_to_the_same_bits(shop, whole, tmp_path, monkeypatch):
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "stop_requested", property(lambda _: signal.SIGTERM if next(asked) == 3 else None))
        with pytest.raises(Interrupted):
            go(shop, tmp_path, *LONG)
    run = go(shop, tmp_path, *LONG, resume=True)
    weights, expected = ((r / "adapter" / "adapter_model.safetensors").read_bytes() for r in (run, whole))
    assert weights == expected and logged(run) == logged(whole)
    one, other = (json.loads((r / "summary.json").read_text()) for r in (run, whole))
    assert all(one[key] == other[key] for key in ("metrics", "baseline", "intervals"))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["reward=rubric:length"], "names 0; name one there"),
        (["reward={paid} + {three}"], "names 2; name one there"),
        (["reward={elsewhere}"], "elsewhere is not of the policy's model"),
        (["critic=head"], "critic"),
    ],
)
def test_what_cannot_start_a_critic_is_refused_before_the_training(shop, tmp_path, pairs, words):
    with pytest.raises(UserError, match=words):
        go(shop, tmp_path, *pairs)
    assert not (tmp_path / "ppo" / "metrics.jsonl").exists()


def test_a_dry_run_counts_the_critic_that_would_learn(shop):
    given = ["task=custom", "model={under}", "reward={paid}"]
    pairs = tiny.overrides(shop, "ppo", *(pair.format(**shop) for pair in given))
    sizes = {critic: dry_run("ppo", None, [*pairs, f"critic={critic}"])["bytes"] for critic in ("adapter", "reward")}
    head = 4 * 33
    # The policy's LoRA has r = 4, the reward model's 6.
    assert sizes["reward"]["value"] - head == (sizes["adapter"]["value"] - head) * 6 / 4
