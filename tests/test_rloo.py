"""RLOO: its gradient against enumeration, its baseline, its switches, and real runs that learn and resume."""

from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_ppo import PROMPTS, liked_tokens

from peftlab.config import keys, load_config
from peftlab.errors import Interrupted, LabError, UserError
from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone, fingerprint
from peftlab.models.roles import Roles
from peftlab.ops.advantages import leave_one_out
from peftlab.ops.kl import exact_kl
from peftlab.ops.logprobs import entropy, token_logprobs
from peftlab.ops.losses import rloo_policy_loss
from peftlab.recipes import ppo, rl_common, rloo
from peftlab.recipes.launch import launch
from peftlab.rl.control import AdaptiveKL, FixedKL
from peftlab.rl.rloo import RLOOSettings, RLOOTrainer
from peftlab.rl.rollout import FirstStep, PromptBatch
from peftlab.runs.atomic import read_rows
from peftlab.runs.metrics import metric
from peftlab.runs.rundir import RunDir
from peftlab.sampling.sampler import Decoding, Sampler, Samples

pytestmark = pytest.mark.usefixtures("one_thread")
EIGHT = PROMPTS.take(range(8))


def trainer(tiny_causal, seed=0, kl=None, reward=None, **settings) -> RLOOTrainer:
    model, tokenizer = tiny_causal("gpt2")
    roles = Roles(Backbone("tiny", model, tokenizer, fingerprint(model)), Lora(r=8, alpha=16), "none")
    sampler = Sampler(roles.twin, tokenizer)
    chosen = RLOOSettings(**{"lr": 2e-2, "warmup_steps": 1, "epoch_kl_stop": 1.0, **settings})
    return RLOOTrainer(roles, sampler, reward or liked_tokens(sampler), kl or FixedKL(0.01), chosen,
                       Decoding(max_new_tokens=8), seed)


def w_words(prompts, completions, records):
    """Reward: words that begin with w, less half of all."""
    return torch.tensor([sum(w[0] == "w" for w in c.split()) - len(c.split()) / 2 for c in completions]), {}


# A bandit of two tokens: 0 ends, 1 goes on, and after two tokens all is over. What it may say, and what that is worth:
WORTH = {(0,): 0.3, (1, 0): 2.0, (1, 1): -1.0}
REFERENCE = torch.tensor([[0.4, -0.2], [-0.5, 0.1]])  # logits of its two places


class Bandit:
    """Stands for `Roles` and `Sampler`: a policy of four logits, which says what it is told to say."""

    model, shared_head = SimpleNamespace(config=SimpleNamespace(vocab_size=2)), None

    def __init__(self) -> None:
        self.logits = torch.nn.Parameter(torch.tensor([[0.1, 0.6], [0.9, -0.4]]))
        self.device = torch.device("cpu")
        self.said: tuple[tuple[int, ...], ...] = ()

    def policy_parameters(self):
        return {"logits": self.logits}

    def policy(self, ids, mask, keep):
        return self.logits[:keep].expand(len(ids), -1, -1)

    def reference(self, ids, mask, keep):
        return REFERENCE[:keep].expand(len(ids), -1, -1)

    def policy_tokens(self, ids, mask, keep, temperature, counted):
        logits = self.policy(ids, mask, keep)
        return token_logprobs(logits, ids[:, -keep:]), entropy(logits), self.values(ids, mask, keep)

    def reference_logprobs(self, ids, mask, keep, temperature, counted):
        return token_logprobs(self.reference(ids, mask, keep), ids[:, -keep:])

    def values(self, ids, mask, keep):
        return torch.zeros(len(ids), keep)

    def state(self):
        return self.policy_parameters()

    def refresh(self):
        """It samples from its logits themselves."""

    moved = refresh

    def log_prob(self, said: tuple[int, ...]) -> torch.Tensor:
        return sum(self.logits[place].log_softmax(-1)[token] for place, token in enumerate(said))

    def sample(self, prompts, seeds, decoding, read) -> Samples:
        assert len(prompts) == len(self.said)
        width = max(map(len, self.said))
        ids = torch.tensor([[*said, *[0] * (width - len(said))] for said in self.said])
        mask = torch.tensor([[place < len(said) for place in range(width)] for said in self.said])
        logprobs = self.logits[:width].log_softmax(-1).detach()[torch.arange(width), ids] * mask
        ones = torch.ones(len(prompts), 1, dtype=torch.bool)
        return Samples(torch.ones(len(prompts), 1, dtype=torch.long), ones, ids, mask, logprobs, (ids == 0).any(1))

    def texts(self, samples):
        return list(self.said)


def expected_gradient(k: int, **settings) -> torch.Tensor:
    """Of the loss, over every k completions that the bandit may give, each as likely as it is."""
    bandit = Bandit()
    chosen = RLOOSettings(lr=0.0, max_grad_norm=1e9, samples_per_prompt=k, **settings)
    score = lambda prompts, said, records: (torch.tensor([WORTH[one] for one in said]), {})  # noqa: E731
    learner = RLOOTrainer(bandit, bandit, score, FixedKL(0.3), chosen, Decoding(max_new_tokens=2))  # type: ignore[arg-type]
    learner.first = FirstStep(0.0, 0.0, 1.0)  # this policy has left its reference
    total = torch.zeros(2, 2)
    for said in itertools.product(WORTH, repeat=k):
        bandit.said = said
        likely = sum(bandit.log_prob(one) for one in said).exp().item()
        learner.step(PromptBatch([[1]], ["x"], [None]))
        total += likely * bandit.logits.grad
    return total


def policy_gradient() -> torch.Tensor:
    """Of E[worth] - 0.3 KL(policy || reference), by autograd through the sum over all that the bandit may say."""
    bandit = Bandit()
    worth = sum(bandit.log_prob(said).exp() * value for said, value in WORTH.items())
    goes_on = bandit.logits[0].softmax(-1)[1]
    first, second = exact_kl(bandit.logits, REFERENCE)
    (worth - 0.3 * (first + goes_on * second)).backward()
    return bandit.logits.grad


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_gradient_is_the_policy_gradient_of_a_bandit(k):
    """To the last digit but for the divisor, the longest completion allowed: the baseline adds no bias."""
    torch.testing.assert_close(-2 * expected_gradient(k), policy_gradient(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("switch", [{"scale_by_std": True}, {"length_normaliser": "sequence"}])
def test_the_switches_of_grpo_bend_the_gradient(switch):
    bent, true = -expected_gradient(3, **switch).flatten(), policy_gradient().flatten()
    assert torch.cosine_similarity(bent, true, dim=0) < 0.9999


@given(st.integers(2, 6), st.integers(1, 4), st.booleans(), st.data())
def test_advantages_of_a_prompt_sum_to_zero(k, prompts, scale, data):
    numbers = st.floats(-100, 100, width=32)
    returns = torch.tensor(data.draw(st.lists(numbers, min_size=k * prompts, max_size=k * prompts)))
    advantages = leave_one_out(returns, k, scale)
    assert advantages.view(prompts, k).sum(1).abs().max() < 1e-3


def test_a_completion_is_measured_against_the_others_of_its_prompt_alone():
    returns = torch.tensor([1.0, 2.0, 6.0, 50.0, 50.0, 50.0])
    advantages = leave_one_out(returns, 3)
    assert advantages.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0], abs=1e-5)
    more = returns + torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    assert (leave_one_out(more, 3) - advantages)[1] == pytest.approx(0.5)  # its own return is not in its baseline
    torch.testing.assert_close(leave_one_out(returns + 7, 3), advantages, atol=1e-4, rtol=0)


def test_scaling_by_std_makes_the_unit_of_the_reward_disappear():
    returns = torch.randn(12)
    scaled = leave_one_out(returns, 4, scale_by_std=True)
    torch.testing.assert_close(leave_one_out(100 * returns, 4, scale_by_std=True), scaled, rtol=2e-3, atol=0)
    assert (leave_one_out(torch.full((4,), 0.1), 4, scale_by_std=True) == 0).all()


@given(st.integers(0, 10_000), st.sampled_from([None, 9]), st.integers(0, 3))
def test_pads_never_change_the_loss(seed, length, extra):
    """Neither what stands in them nor how many there are."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (5,), generator=generator)
    new, old, advantages = (torch.randn(5, 7, generator=generator) * scale for scale in (0.1, 0.1, 1.0))
    mask = torch.arange(7) < lengths[:, None]
    expected = rloo_policy_loss(new, old, advantages, mask, 0.2, length)
    noisy = [tensor + torch.where(mask, 0.0, noise) for tensor, noise in ((new, 30.0), (old, 3.0), (advantages, -9.0))]
    wide = [torch.nn.functional.pad(tensor, (0, extra), value=5.0) for tensor in noisy]
    counted = torch.nn.functional.pad(mask, (0, extra))
    torch.testing.assert_close(rloo_policy_loss(*wide, counted, 0.2, length), expected)


def test_a_fixed_length_weighs_tokens_alike_and_a_sequence_its_completion():
    mask = torch.arange(6) < torch.tensor([1, 6])[:, None]
    ones = torch.ones(2, 6)
    for length, weights in ((6, [1, 6]), (None, [6, 6])):
        logprobs = torch.zeros(2, 6, requires_grad=True)
        rloo_policy_loss(logprobs, torch.zeros(2, 6), ones, mask, 0.2, length)[0].backward()
        assert (-logprobs.grad.sum(1) * 2 * 6).tolist() == pytest.approx(weights)


def test_rloo_raises_a_toy_reward_and_touches_only_the_policy(tiny_causal):
    learner = trainer(tiny_causal)
    base = learner.roles.frozen_hash()
    steps = [learner.step(EIGHT)[1] for _ in range(25)]
    rewards = [stats["reward/mean"] for stats in steps]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1.0
    assert learner.roles.frozen_hash() == base
    assert learner.first.kl == 0.0 and learner.first.ratio_error <= 1e-4
    assert not any(name.startswith("value/") for stats in steps for name in stats)


def test_there_is_no_critic_anywhere(tiny_causal):
    learner = trainer(tiny_causal)
    rollout, _, _ = learner.step(EIGHT)
    assert learner.roles.head is None and learner.roles.critic_parameters() == {}
    assert "value" not in learner.roles.bytes_per_role()
    assert learner.state_dict()["roles"].keys() == learner.roles.policy_parameters().keys()
    assert (rollout.values == 0).all()


def test_the_copies_of_a_prompt_stand_together_and_share_an_advantage_a_completion(tiny_causal):
    rollout, _, tensors = trainer(tiny_causal, samples_per_prompt=3).step(EIGHT)
    assert rollout.prompts.token_ids == [ids for ids in EIGHT.token_ids for _ in range(3)]
    assert len(set(rollout.completions)) > 8
    mask, advantages = rollout.completion_mask, tensors["advantage"]
    assert (advantages[~mask] == 0).all()
    assert torch.equal(advantages, advantages[:, :1] * mask)
    expected = leave_one_out(tensors["reward"].sum(1), 3)
    torch.testing.assert_close(advantages[:, 0], expected)


def test_one_pass_is_on_policy_and_more_are_clipped(tiny_causal):
    _, once, _ = trainer(tiny_causal).step(EIGHT)
    assert once["policy/clip_fraction"] == 0 and abs(once["policy/approx_kl"]) < 1e-6 and once["update/epochs"] == 1
    reused = {"reward": w_words, "epochs": 6, "minibatch_size": 16}
    _, often, _ = trainer(tiny_causal, **reused, epoch_kl_stop=100.0).step(EIGHT)
    assert often["policy/clip_fraction"] > 0 and often["update/epochs"] == 6
    _, broken, _ = trainer(tiny_causal, **reused, epoch_kl_stop=0.02).step(EIGHT)
    assert 1 <= broken["update/epochs"] < 6


def test_resuming_gives_the_same_bits(tiny_causal, tmp_path):
    settings = {"epochs": 2, "minibatch_size": 16}
    whole = trainer(tiny_causal, **settings)
    for _ in range(4):
        whole.step(EIGHT)
    first = trainer(tiny_causal, **settings)
    for _ in range(2):
        first.step(EIGHT)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = trainer(tiny_causal, **settings)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):
        second.step(EIGHT)
    resumed = second.roles.state()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.roles.state().items())


def test_an_adaptive_coefficient_brings_the_kl_to_its_target(tiny_causal):
    control = AdaptiveKL(coef=0.2, target=1.5, horizon=400)
    learner = trainer(tiny_causal, kl=control, reward=w_words, lr=1e-2, total_steps=10_000)
    prompts = PROMPTS.take(range(16))
    kls = [learner.step(prompts)[1]["kl/reference"] for _ in range(60)]
    assert abs(kls[0]) < 1e-3
    assert sum(kls[-30:]) / 30 == pytest.approx(1.5, rel=0.25)


# The rest runs the whole recipe, on random models that load by path.
LETTERS = "def count(prompts, completions, records):\n    return [c.count('e') / 2.0 for c in completions]\n"
LONG = ["steps=6", "save_every=2", "kl_target=1.0", "epochs=2", "minibatch_size=5"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop, a judge that `classify` trained for two steps, and a reward of one's own."""
    root = tmp_path_factory.mktemp("rloo")
    shop = tiny.workshop(root) | {"root": str(root)}
    launch("classify", None, tiny.overrides(shop, "classify"), root / "runs", "judge")
    (root / "my_letters.py").write_text(LETTERS)
    return shop | {"judge": str(root / "runs" / "judge")}


def go(shop: dict[str, str], runs: Path, *pairs: str, resume: bool = False) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shop["root"])
        given = [f"judge={shop['judge']}", "reward=my_letters:count", *pairs]
        launch("rloo", None, tiny.overrides(shop, "rloo", *given), runs, "rloo", resume)
    return runs / "rloo"


@pytest.fixture(scope="module")
def whole(shop) -> Path:
    """A run that nothing stopped."""
    return go(shop, Path(shop["root"]) / "whole", *LONG)


def logged(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    return [{n: v for n, v in row.items() if not n.startswith("time")} for row in read_rows(run / "metrics.jsonl")]


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_a_run_tells_its_invariants_and_both_sides(whole):
    summary = summary_of(whole)
    assert (summary["status"], summary["recipe"]) == ("done", "rloo")
    assert summary["metrics"]["invariant/first_kl"] == 0.0
    assert 0 <= summary["metrics"]["invariant/first_ratio_error"] <= 1e-4
    assert summary["baseline"]["eval/kl"] == 0.0 < summary["metrics"]["eval/kl"]
    rows = logged(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(metric(name) for row in rows for name in row if name != "step")
    assert rows[0]["reward/group_std"] > 0
    assert {row["side"] for row in read_rows(whole / "samples.jsonl")} == {"before", "after"}


def test_a_run_records_the_answers_of_one_prompt_token_by_token(whole):
    """Four answers to the first prompt, each with one advantage, which sum to zero; no critic has said anything."""
    rows = [row for row in read_rows(whole / "rollouts.jsonl") if row["step"] == 1]
    assert len(rows) == 4 and len({row["prompt_id"] for row in rows}) == 1
    advantages = [{token["advantage"] for token in row["tokens"]} for row in rows]
    assert all(len(values) == 1 for values in advantages)
    assert abs(sum(values.pop() for values in advantages)) < 1e-5
    assert all("value" not in token for row in rows for token in row["tokens"])
    page = (whole / "report.html").read_text()
    assert "RLOO" in page and "the other answers to the prompt" in page and "the critic" not in page
    assert ">value</th>" not in page and ">ref_logprob</th>" in page


def test_only_the_policy_is_saved(whole):
    saved = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    newest = max((whole / "checkpoints").iterdir())
    state = torch.load(newest / "state.pt", weights_only=True)
    assert len(state["trainer"]["roles"]) == len(saved)


@pytest.mark.parametrize("step", [1, 4])
def test_a_stopped_run_resumes_to_the_same_bits(shop, whole, tmp_path, monkeypatch, step):
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "stop_requested", property(lambda _: signal.SIGTERM if next(asked) == step else None))
        with pytest.raises(Interrupted):
            go(shop, tmp_path, *LONG)
    assert summary_of(tmp_path / "rloo")["status"] == "stopped"
    torch.manual_seed(step)  # whatever the process drew before the resume does not matter
    run = go(shop, tmp_path, *LONG, resume=True)
    weights, expected = ((r / "adapter" / "adapter_model.safetensors").read_bytes() for r in (run, whole))
    assert weights == expected
    assert logged(run) == logged(whole)
    for key in ("metrics", "baseline", "intervals", "artifacts"):
        assert summary_of(run)[key] == summary_of(whole)[key]


def test_a_kl_that_runs_away_ends_the_run_with_its_reason(shop, tmp_path):
    summary = summary_of(go(shop, tmp_path, "steps=20", "lr=0.1", "kl_coef=0", "kl_stop=0.5"))
    assert summary["status"] == "done" and "kl_stop 0.5" in summary["reason"]


def test_the_last_step_is_recorded_whatever_ends_the_run(shop, tmp_path):
    """Its exact KL is not asked for: that would pass other batches through the model, whose last bits may differ."""
    for name, ends in (("all", ["steps=3"]), ("far", ["steps=20", "lr=0.1", "kl_coef=0", "kl_stop=0.5"])):
        run = go(shop, tmp_path / name, "record_every=100", *ends)
        steps = [row["step"] for row in read_rows(run / "metrics.jsonl")]
        assert 1 < steps[-1] < 20
        assert {row["step"] for row in read_rows(run / "rollouts.jsonl")} == {1, steps[-1]}
        assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "kl/exact" in row] == [1]


def test_a_policy_that_left_its_reference_is_stopped_and_stands_in_the_log(shop, tmp_path, monkeypatch):
    def stale(*args, **kwargs):
        roles = Roles(*args, **kwargs)
        for parameter in roles.policy_parameters().values():
            torch.nn.init.normal_(parameter, std=0.1)
        return roles

    monkeypatch.setattr(rloo, "Roles", stale)
    with pytest.raises(LabError, match="first_kl"):
        go(shop, tmp_path)
    summary = summary_of(tmp_path / "rloo")
    assert summary["status"] == "failed" and summary["metrics"]["invariant/first_kl"] > 0
    assert not (tmp_path / "rloo" / "adapter").exists()


@pytest.mark.parametrize(("pair", "message"), [
    ("samples_per_prompt=1", "samples_per_prompt"),
    ("length_normaliser=token", "length_normaliser"),
    ("critic=shared", "critic"),
    ("max_new_tokens=89", "context"),
    ("model={judge}", "rloo needs a causal language model"),
    ("reward=", "nothing to optimise"),
])
def test_what_cannot_work_is_one_message_before_training(shop, tmp_path, pair, message):
    with pytest.raises(UserError, match=message):
        go(shop, tmp_path, pair.format(**shop))
    assert not (tmp_path / "rloo" / "metrics.jsonl").exists()


def test_rounded_gradients_are_a_cpus(shop, tmp_path, monkeypatch):
    elsewhere = SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(kind="causal")
    monkeypatch.setattr(rl_common, "load_stack", lambda *_, **__: elsewhere)
    with pytest.raises(UserError, match="gradients: bfloat16 is for a CPU, and this is cuda; leave it out"):
        go(shop, tmp_path, "gradients=bfloat16")


def test_the_keys_that_both_share_are_called_alike_and_the_shipped_configs_sample_as_much():
    own = {"samples_per_prompt", "scale_by_std", "length_normaliser"}
    critics = {"critic", "critic_lr", "critic_warmup", "lam", "value_clip", "value_coef"}
    assert set(keys(rloo.CONFIG)) - own == set(keys(ppo.CONFIG)) - critics
    tinies = load_config(rloo.CONFIG, "rloo-tiny"), load_config(ppo.CONFIG, "ppo-tiny")
    episodes = [c.steps * c.prompts_per_step * getattr(c, "samples_per_prompt", 1) for c in tinies]
    assert episodes[0] == episodes[1]


def test_every_setting_is_read():
    from test_house import reads

    assert RLOOSettings.__dataclass_fields__.keys() - (reads("rl.rloo") | reads("rl.trainer")) == set()


def test_every_key_is_explained():
    page = (Path(__file__).parent.parent / "docs" / "rloo.md").read_text()
    assert [key for key in keys(rloo.CONFIG) if key != "recipe" and f"`{key}`" not in page] == []
