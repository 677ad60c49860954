"""PPO as a whole, on a random two-layer model with a reward that needs no classifier."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlab.errors import LabError
from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone, fingerprint
from peftlab.models.roles import Roles
from peftlab.recipes.ppo import PPOConfig
from peftlab.recipes.rl_common import settings_of
from peftlab.rl.control import AdaptiveKL, FixedKL
from peftlab.rl.ppo import PPOSettings, PPOTrainer
from peftlab.rl.rollout import FirstStep, PromptBatch, shaped_rewards
from peftlab.sampling.sampler import Decoding, Sampler

LIKED = 9
PROMPTS = PromptBatch([[3, 4 + i % 5] for i in range(32)], ["x"] * 32, [None] * 32)


def liked_tokens(sampler: Sampler):
    """Reward: the share of a completion's words that are the one we like."""
    word = sampler.tokenizer.convert_ids_to_tokens(LIKED)

    def score(prompts, completions, records):
        return torch.tensor([float(c.count(word)) for c in completions]), {}

    return score


def trainer(tiny_causal, critic="shared", seed=0, kl=None, reward=None, **settings) -> PPOTrainer:
    model, tokenizer = tiny_causal("gpt2")
    roles = Roles(Backbone("tiny", model, tokenizer, fingerprint(model)), Lora(r=8, alpha=16), critic)
    torch.manual_seed(seed)
    sampler = Sampler(roles.twin, tokenizer)
    chosen = PPOSettings(**{"lr": 5e-3, "critic_lr": 5e-3, "minibatch_size": 16, "epochs": 2, "warmup_steps": 1,
                            "epoch_kl_stop": 1.0, **settings})
    return PPOTrainer(roles, sampler, reward or liked_tokens(sampler), kl or FixedKL(0.01), chosen,
                      Decoding(max_new_tokens=8), seed)


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_ppo_raises_a_toy_reward_and_touches_only_adapters(tiny_causal, critic):
    ppo = trainer(tiny_causal, critic)
    base = ppo.roles.frozen_hash()
    rewards = [ppo.step(PROMPTS)[1]["reward/mean"] for _ in range(25)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1.0
    assert ppo.roles.frozen_hash() == base


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_a_constant_added_to_the_reward_changes_nothing(tiny_causal, critic):
    def learner_of(constant: float) -> PPOTrainer:
        return trainer(
            tiny_causal, critic, reward=lambda p, c, r: (torch.tensor([float(len(set(t))) for t in c]) + constant, {})
        )

    plain, raised = learner_of(0.0), learner_of(7.0)
    for _ in range(3):
        (_, _, before), (_, _, after) = plain.step(PROMPTS), raised.step(PROMPTS)
        torch.testing.assert_close(after["advantage"], before["advantage"], atol=1e-3, rtol=1e-3)
    learned = (learner.roles.policy_parameters().values() for learner in (plain, raised))
    for one, other in zip(*learned, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-2)


def test_the_first_step_starts_at_its_reference(tiny_causal):
    ppo = trainer(tiny_causal)
    _, stats, _ = ppo.step(PROMPTS)
    assert ppo.first.kl == 0.0
    assert ppo.first.ratio_error <= 1e-4
    assert abs(stats["kl/reference"]) < 1e-3


def test_a_policy_that_is_not_fresh_is_stopped(tiny_causal):
    ppo = trainer(tiny_causal)
    with torch.no_grad():
        for name, parameter in ppo.roles.policy_parameters().items():
            if "lora_B" in name:
                parameter.add_(0.01)
    with pytest.raises(LabError, match="first_kl"):
        ppo.step(PROMPTS)


def test_a_sampler_that_disagrees_with_the_policy_is_stopped():
    with pytest.raises(LabError, match="first_ratio_error"):
        FirstStep(0.0, 0.01, 1e-4).check()
    with pytest.raises(LabError, match="first_ratio_error"):
        FirstStep(0.0, float("nan"), 1e-4).check()


def test_a_non_finite_reward_stops_before_the_weights_move(tiny_causal):
    ppo = trainer(tiny_causal, reward=lambda p, c, r: (torch.full((len(c),), float("nan")), {}))
    before = {name: value.clone() for name, value in ppo.roles.state().items()}
    with pytest.raises(LabError, match="step 1"):
        ppo.step(PROMPTS)
    assert all(torch.equal(before[name], value) for name, value in ppo.roles.state().items())


def test_resuming_gives_the_same_bits(tiny_causal, tmp_path):
    whole = trainer(tiny_causal)
    for _ in range(4):
        whole.step(PROMPTS)
    first = trainer(tiny_causal)
    for _ in range(2):
        first.step(PROMPTS)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = trainer(tiny_causal)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):
        second.step(PROMPTS)
    resumed = second.roles.state()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.roles.state().items())


def test_critic_only_steps_leave_the_policy_alone(tiny_causal):
    ppo = trainer(tiny_causal, critic="adapter", critic_warmup=2)
    before = {name: value.detach().clone() for name, value in ppo.roles.policy_parameters().items()}
    critic = {name: value.detach().clone() for name, value in ppo.roles.critic_parameters().items()}
    ppo.step(PROMPTS)
    assert all(torch.equal(before[name], value) for name, value in ppo.roles.policy_parameters().items())
    assert any(not torch.equal(critic[name], value) for name, value in ppo.roles.critic_parameters().items())


def test_one_epoch_without_a_clip_is_reinforce_with_a_baseline(tiny_causal):
    """The policy's gradient is that of log p times (reward to go - value), whitened, written out token by token."""
    free = {"epochs": 1, "minibatch_size": 32, "clip": 1e9, "max_grad_norm": 1e9, "lam": 1.0, "lr": 0.0}
    ppo = trainer(tiny_causal, critic="adapter", kl=FixedKL(0.3), **free)
    torch.nn.init.normal_(ppo.roles.head.linear.weight, std=0.3)  # a critic that says something
    rollout, _, tensors = ppo.step(PROMPTS)
    learned = list(ppo.roles.policy_parameters().values())
    gradients = [parameter.grad.clone() for parameter in learned]

    tokens = rollout.completion_ids
    logprobs = ppo.roles.policy(rollout.ids, rollout.mask, tokens.shape[1]).log_softmax(-1)
    terms, better = [], []
    for row, length in enumerate(rollout.completion_mask.sum(1).tolist()):
        for t in range(length):
            better.append(float(tensors["reward"][row, t:length].sum() - rollout.values[row, t]))
            terms.append(logprobs[row, t, tokens[row, t]])
    baseline = torch.tensor(better)
    weights = (baseline - baseline.mean()) / baseline.std(correction=0)
    for parameter in learned:
        parameter.grad = None
    (-(weights * torch.stack(terms)).sum() / len(terms)).backward()
    assert max(gradient.abs().max() for gradient in gradients) > 1e-2
    for gradient, parameter in zip(gradients, learned, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)


def test_shaped_rewards_sum_to_score_less_kl(tiny_causal):
    ppo = trainer(tiny_causal)
    rollout, _, _ = ppo.step(PROMPTS)
    rollout = dataclasses.replace(rollout, ref_logprobs=rollout.logprobs - 0.5 * rollout.completion_mask)
    lengths = rollout.completion_mask.sum(1)
    torch.testing.assert_close(
        shaped_rewards(rollout, kl_coef=0.2).sum(1), rollout.scores - 0.2 * 0.5 * lengths, atol=1e-5, rtol=0
    )
    plain = shaped_rewards(rollout, 0.0, eos_penalty=1.0)
    cut = ~(rollout.completion_ids == ppo.sampler.eos_id).any(1)
    torch.testing.assert_close(plain.sum(1), rollout.scores - cut.float())


def test_adaptive_kl_finds_its_target_on_a_toy():
    """A plant whose KL falls as the coefficient rises: kl = 2 / coef."""
    control = AdaptiveKL(coef=0.05, target=6.0, horizon=1_000)
    for _ in range(400):
        control.update(2 / control.coef, episodes=64)
    assert abs(2 / control.coef - 6.0) < 0.1


@given(
    coef=st.floats(1e-6, 1e3),
    target=st.floats(1e-6, 1e3),
    horizon=st.floats(1e-6, 1e6),
    steps=st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 10_000)), max_size=40),
)
def test_an_adaptive_coefficient_stays_above_0_and_never_leaps(coef, target, horizon, steps):
    """Whatever the horizon: a KL below its target lowers it, one above raises it, by a fifth of it at most."""
    control = AdaptiveKL(coef, target, horizon)
    for kl, episodes in steps:
        before = control.coef
        control.update(kl, episodes)
        assert 0 < 0.8 * before * (1 - 1e-9) <= control.coef <= 1.2 * before * (1 + 1e-9)
        assert (control.coef >= before) if kl >= target else (control.coef <= before)


def test_adaptive_kl_clips_its_error():
    control = AdaptiveKL(coef=1.0, target=1.0, horizon=100)
    control.update(1e9, episodes=100)
    assert control.coef == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("keys", "limit"),
    [
        ({}, 1e-5),
        ({"model": "runs/sft-tiny"}, 1e-4),
        ({"temperature": 0.5}, 1e-4),
        ({"prompt_tokens": (400, 440)}, 1e-4),
        ({"prompt_tokens": (0, 0)}, 1e-4),
    ],
)
def test_the_tight_limit_is_for_tiny_gpt2_at_temperature_1_on_short_prompts(keys, limit):
    job = SimpleNamespace(roles=SimpleNamespace(device=torch.device("cpu"), precision="fp32"))
    assert settings_of(PPOSettings, PPOConfig(**keys), job).ratio_limit == limit
