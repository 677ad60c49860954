"""Properties of the tensor functions; libraries and enumeration judge them, never the formula again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from peftlab.ops.advantages import explained_variance, gae
from peftlab.ops.kl import exact_kl, k1, k2, k3
from peftlab.ops.logprobs import entropy, token_logprobs
from peftlab.ops.losses import ppo_policy_loss, value_loss
from peftlab.ops.masks import completion_mask, last_true, masked_mean, masked_whiten, position_ids


def ragged(seed: int, rows: int = 5, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and a mask with one run of True from t = 0 in each row."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    return torch.randn(rows, width, generator=generator), mask


def test_positions_number_the_tokens_whatever_the_side():
    left = torch.tensor([[False, False, True, True, True]])
    right = left.flip(1)
    assert position_ids(left)[left].tolist() == position_ids(right)[right].tolist() == [0, 1, 2]


def test_completion_mask_counts_the_eos_and_nothing_after():
    ids = torch.tensor([[5, 2, 2, 7], [5, 6, 7, 8], [2, 5, 5, 5]])
    assert completion_mask(ids, 2).sum(1).tolist() == [2, 4, 1]
    assert completion_mask(ids, None).all()


def test_last_true():
    mask = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
    assert last_true(mask).tolist() == [1, 2, 0]


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_whitening_has_mean_0_and_variance_1_and_ignores_pads(seed):
    values, mask = ragged(seed)
    white = masked_whiten(3 + 2 * values, mask)
    if mask.sum() > 2:
        assert white[mask].mean().abs() < 1e-5
        assert white[mask].var(unbiased=False).sub(1).abs() < 1e-3
    changed = torch.where(mask, values, torch.full_like(values, 1e3))
    torch.testing.assert_close(masked_whiten(3 + 2 * changed, mask), white)
    assert (white[~mask] == 0).all()


def test_gae_with_lambda_1_is_return_minus_value():
    """Schulman et al. 2016, eq. 18: with lambda = 1 the sum telescopes to the discounted return less the value."""
    rewards, mask = ragged(0)
    values, _ = ragged(1)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        for t in range(length):
            tail = sum(0.9 ** (k - t) * float(rewards[row, k]) for k in range(t, length))
            assert math.isclose(float(advantages[row, t]), tail - float(values[row, t]), abs_tol=1e-5)


def test_gae_with_lambda_0_is_the_temporal_difference():
    rewards, mask = ragged(2)
    values, _ = ragged(3)
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    row, length = 0, int(mask[0].sum())
    for t in range(length):
        following = float(values[row, t + 1]) if t + 1 < length else 0.0
        expected = float(rewards[row, t]) + 0.5 * following - float(values[row, t])
        assert math.isclose(float(advantages[row, t]), expected, abs_tol=1e-5)
    torch.testing.assert_close(returns, (advantages + values) * mask)


def test_a_perfect_critic_leaves_no_advantage():
    rewards, mask = ragged(4)
    rewards = rewards * mask
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, mask)
    assert advantages.abs().max() < 1e-5
    assert explained_variance(values, returns, mask) > 0.9999


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_pads_never_change_advantages_or_losses(seed):
    values, mask = ragged(seed)
    rewards, _ = ragged(seed + 1)
    noise = torch.where(mask, torch.zeros(()), torch.full((), 50.0))
    torch.testing.assert_close(gae(rewards, values, mask), gae(rewards + noise, values - noise, mask))
    old, advantages = values * 0.1, rewards
    torch.testing.assert_close(
        ppo_policy_loss(values, old, advantages, mask), ppo_policy_loss(values + noise, old, advantages - noise, mask)
    )
    torch.testing.assert_close(
        value_loss(values, old, rewards, mask), value_loss(values + noise, old - noise, rewards, mask)
    )


def test_token_logprobs_agree_with_torch_distributions_at_any_temperature():
    logits, ids = torch.randn(3, 4, 11), torch.randint(11, (3, 4))
    for temperature in (0.5, 1.0, 2.0):
        reference = Categorical(logits=logits / temperature)
        torch.testing.assert_close(token_logprobs(logits, ids, temperature), reference.log_prob(ids))
        torch.testing.assert_close(entropy(logits, temperature), reference.entropy())


def test_exact_kl_agrees_with_torch_and_is_exactly_0_for_equal_logits():
    p, q = torch.randn(3, 4, 50), torch.randn(3, 4, 50)
    torch.testing.assert_close(exact_kl(p, q), kl_divergence(Categorical(logits=p), Categorical(logits=q)))
    assert (exact_kl(p, p.clone()) == 0.0).all()


@pytest.mark.parametrize(("estimator", "tolerance"), [(k1, 0.02), (k2, 0.03), (k3, 0.02)])
def test_estimators_converge_to_the_exact_kl(estimator, tolerance):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(6, generator=generator)
    q = p + 0.3 * torch.randn(6, generator=generator)
    logp, logq = p.log_softmax(0), q.log_softmax(0)
    draws = torch.multinomial(logp.exp(), 200_000, replacement=True, generator=generator)
    estimate = estimator(logp[draws], logq[draws]).mean()
    exact = exact_kl(p, q)
    assert abs(estimate - exact) < max(tolerance * float(exact) * 5, 5e-3)
    if estimator is not k1:
        assert (estimator(logp[draws], logq[draws]) >= 0).all()


def test_ppo_loss_at_ratio_1_has_the_policy_gradient():
    """With new = old the surrogate's gradient is that of -A log pi: REINFORCE with a baseline."""
    logprobs, mask = ragged(7)
    advantages, _ = ragged(8)
    leaf = logprobs.clone().requires_grad_()
    loss, clipped = ppo_policy_loss(leaf, logprobs, advantages, mask)
    loss.backward()
    other = logprobs.clone().requires_grad_()
    masked_mean(-advantages * other, mask).backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert clipped == 0


def test_the_clip_stops_the_gradient_only_on_the_side_that_gains():
    mask = torch.ones(1, 4, dtype=torch.bool)
    old = torch.zeros(1, 4)
    new = torch.log(torch.tensor([[1.5, 1.5, 0.5, 0.5]])).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, clipped = ppo_policy_loss(new, old, advantages, mask, clip=0.2)
    loss.backward()
    assert (new.grad != 0).tolist() == [[False, True, True, False]]
    assert clipped == 0.5
