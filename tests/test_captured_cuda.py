"""Passes replayed from CUDA graphs say and learn what the same passes do kernel by kernel. Skipped without CUDA."""

from __future__ import annotations

import pytest
import test_captured
import torch
from test_captured import DOCUMENTS, PACKED, SHAPES, learner, read, trained
from torch import nn

from peftlab.models.adapters import Lora
from peftlab.models.backbone import Backbone
from peftlab.models.captured import KINDS
from peftlab.models.reward_model import RewardNet
from peftlab.models.roles import Roles
from peftlab.training.quick_passes import quick_passes, replayed_passes
from peftlab.training.state_loss import loss_from_states

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def roles_on_cuda(tiny_causal, architecture: str, critic: str) -> Roles:
    model, tokenizer = tiny_causal(architecture)
    roles = Roles(Backbone("tiny", model.to("cuda"), tokenizer, ""), Lora(r=3, alpha=8), critic)
    torch.manual_seed(0)
    for parameter in (roles.policy_parameters() | roles.critic_parameters()).values():
        nn.init.normal_(parameter, std=0.1)
    return roles


def batch(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in test_captured.batch(rows, tokens, seed))


@pytest.mark.parametrize("critic", ["shared", "adapter"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_replayed_passes_say_and_learn_what_plain_ones_do(tiny_causal, architecture, critic):
    roles = roles_on_cuda(tiny_causal, architecture, critic)
    learned = [*roles.policy_parameters().values(), *roles.critic_parameters().values()]
    plain = [read(roles, *batch(rows, tokens, seed), keep) for seed in range(4) for rows, tokens, keep in SHAPES]
    for parameter in learned:
        parameter.grad = None
    roles.quicken()
    replayed = [read(roles, *batch(rows, tokens, seed), keep) for seed in range(4) for rows, tokens, keep in SHAPES]
    assert roles.captured is not None
    assert all(one.graphs for one in roles.captured.passes.values())
    for ours, theirs in zip(replayed, plain, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).norm() <= 2e-3 * other.norm() + 1e-5


def test_weights_that_move_are_those_of_the_next_replay(tiny_causal):
    roles = roles_on_cuda(tiny_causal, "llama", "none")
    roles.quicken()
    ids, mask = batch(3, 9, 0)
    with torch.no_grad():
        seen = [roles.policy_tokens(ids, mask, 4)[0].clone() for _ in range(3)]
        torch.testing.assert_close(seen[1], seen[2], rtol=0, atol=0)
        for parameter in roles.policy_parameters().values():
            parameter.mul_(2)
        moved = roles.policy_tokens(ids, mask, 4)[0].clone()
    roles.captured = None
    with torch.no_grad():
        torch.testing.assert_close(moved, roles.policy_tokens(ids, mask, 4)[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(moved, seen[2], atol=1e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_merged_policy_says_and_learns_what_it_does_beside_its_base(tiny_causal, architecture):
    """Merged kernel by kernel, then captured, then replayed: each time with weights that have moved."""
    ours, theirs = (roles_on_cuda(tiny_causal, architecture, "shared") for _ in range(2))
    ours.quicken(merged=True)
    theirs.quicken()
    for turn in range(5):
        for roles in (ours, theirs):
            for at, parameter in enumerate(roles.policy_parameters().values()):
                torch.manual_seed(31 * turn + at)
                nn.init.normal_(parameter, std=0.1)
            roles.moved()
        for one, other in zip(read(ours, *batch(3, 9, turn), 4), read(theirs, *batch(3, 9, turn), 4), strict=True):
            assert (one - other).norm() <= 2e-3 * other.norm() + 1e-5
        if turn == 3:
            ours.refresh(None)  # as an evaluation of the reference leaves it
    assert ours.merged is not None and ours.merged.graph is not None


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_reward_model_scores_by_replays_and_follows_its_weights(tiny_causal, architecture):
    model, tokenizer = tiny_causal(architecture)
    net = RewardNet.fresh(Backbone("tiny", model.to("cuda"), tokenizer, ""), Lora(r=3, alpha=8), members=2)
    ids, mask = batch(3, 9, 0)
    for moved in (False, True):
        for member in range(2):
            net.use(member)
            if moved:
                with torch.no_grad():
                    for parameter in net.learned(member).values():
                        parameter.add_(0.3)
            scores = [net.score(ids, mask).clone() for _ in range(3)]
            for one in scores:
                torch.testing.assert_close(one, net(ids, mask), rtol=1e-3, atol=1e-3)
    assert net.captured is not None and len(net.captured.passes) == 2
    assert all(one.graphs for one in net.captured.passes.values())


def test_a_backward_behind_another_pass_of_its_role_is_refused(tiny_causal):
    roles = roles_on_cuda(tiny_causal, "gpt2", "none")
    roles.quicken()
    ids, mask = batch(3, 9, 0)
    for _ in range(2):
        roles.policy_tokens(ids, mask, 4)[0].sum().backward()
    first = roles.policy_tokens(ids, mask, 4)[0].sum()
    roles.policy_tokens(ids, mask, 4)[0].sum().backward()
    with pytest.raises(RuntimeError, match="another pass of this role"):
        first.backward()
    twice = roles.policy_tokens(ids, mask, 4)[0].sum()
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="it has had one"):
        twice.backward()


def test_a_kind_is_captured_while_what_another_gave_is_still_held(tiny_causal):
    """As in a minibatch of several passes, where the loss of one lives until that of the next is there."""
    roles = roles_on_cuda(tiny_causal, "llama", "shared")
    roles.quicken()
    loss = None
    for _ in range(3):
        for tokens in (9, 30, 60):
            loss = roles.policy_tokens(*batch(3, tokens, 0), 4)[0].sum()
            loss.backward()
    assert roles.captured is not None and loss is not None
    assert len(roles.captured.passes) == 3 and all(one.graphs for one in roles.captured.passes.values())


def test_kinds_are_forgotten_beyond_their_number(tiny_causal):
    roles = roles_on_cuda(tiny_causal, "gpt2", "none")
    roles.quicken()
    for rows in (8 * (1 + i) for i in range(KINDS + 2)):
        ids, mask = batch(rows, 9, 0)
        for _ in range(2):
            roles.reference_logprobs(ids, mask, 4)
    assert roles.captured is not None and len(roles.captured.passes) == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_rows_are_learned_from_by_replays_as_without(tiny_causal, kind):
    policy = learner(tiny_causal, kind, 0.0).to("cuda")
    batches = [(ids.cuda(), DOCUMENTS[:, :n].cuda()) for ids, n in PACKED]
    with torch.autocast("cuda", torch.bfloat16), loss_from_states(policy):
        expected = [tensor.clone() for tensor in trained(policy, batches)]
    policy.zero_grad()
    with loss_from_states(policy), replayed_passes(policy) as captured:
        found = []
        for batch in batches:  # as Trainer does: a region of autocast each
            with torch.autocast("cuda", torch.bfloat16):
                found += trained(policy, [batch])[:1]
        found += [p.grad for p in policy.parameters() if p.requires_grad]
    assert [len(one.graphs) for one in captured.passes.values()] == [2]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 0.03 * other.norm() + 1e-3


def test_each_replay_drops_out_anew(tiny_causal):
    policy = learner(tiny_causal, "gpt2", 0.5).to("cuda")
    batches = [(PACKED[0][0].cuda(), DOCUMENTS.cuda())] * 6
    with quick_passes(policy):
        losses = torch.stack(trained(policy, batches)[:6])
    assert len(losses.unique()) == 6
