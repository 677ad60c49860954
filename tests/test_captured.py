"""What a decoding step and a captured pass are made of, as far as a CPU can tell."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from peftlab.models import captured
from peftlab.models.adapters import Lora, LoraVariants, adapter_parameters, attach
from peftlab.models.backbone import Backbone, trunk
from peftlab.models.captured import CapturedStates, Pass, bucket, capturable
from peftlab.models.reward_model import RewardNet
from peftlab.models.roles import Roles
from peftlab.recipes.common import require_gradients
from peftlab.sampling.attention import few_queries
from peftlab.training.quick_passes import replayable, replayed_passes

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = [(3, 9, 4), (8, 16, 8), (5, 20, 11), (3, 9, 4)]  # rows, tokens, tokens of the completion


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_few_queries_attend_as_many_do(rows, groups, queries, slots, dtype):
    torch.manual_seed(rows + 5 * slots)
    query = torch.randn(rows, groups, queries, 8, dtype=dtype)
    keys, values = torch.randn(2, rows, groups, slots + 3, 8, dtype=dtype)[..., :slots, :]
    unseen = torch.where(torch.rand(rows, 1, 1, slots) < 0.4, -1e30, 0.0).to(dtype)
    unseen[..., -1] = 0
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=unseen.expand(-1, groups, queries, -1))
    near = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(few_queries(query, keys, values, unseen), expected, atol=near, rtol=near)


class Graph:
    """A CUDA graph for a CPU: a replay runs again what was captured, on what lies at the same addresses."""

    def replay(self) -> None:
        one = self.owner
        if self is one.graphs[0]:
            with one.acting(), torch.set_grad_enabled(bool(one.turn.learned)):
                self.made = one._run()
            one.made.copy_(self.made.detach())
        else:
            gradients = torch.autograd.grad(one.graphs[0].made, one.turn.learned, one.slopes)
            torch._foreach_copy_(one.turn.gradients, gradients)


@pytest.fixture
def graphs(monkeypatch):
    """torch.cuda's streams and graphs, without a GPU; tests/test_captured_cuda.py has the same with one."""
    stream = SimpleNamespace(device=torch.device("cpu"), wait_stream=lambda other: None)
    fakes = {"Stream": lambda device: stream, "current_stream": lambda: stream, "CUDAGraph": Graph,
             "graph_pool_handle": object, "synchronize": lambda device: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("stream", "device", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    capture, states = Pass._capture, Pass.states

    def owned(one: Pass) -> None:
        capture(one)
        for graph in one.graphs:
            graph.owner = one

    def told(one: Pass, acting) -> torch.Tensor:
        one.acting = acting
        return states(one, acting)

    monkeypatch.setattr(Pass, "_capture", owned)
    monkeypatch.setattr(Pass, "states", told)


def roles_of(causal, kind: str, critic: str) -> Roles:
    model, tokenizer = causal(kind)
    roles = Roles(Backbone("tiny", model, tokenizer, ""), Lora(r=3, alpha=8), critic)
    for parameter in (roles.policy_parameters() | roles.critic_parameters()).values():
        nn.init.normal_(parameter, std=0.1)
    return roles


def batch(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded in front, completions behind."""
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    for row in range(rows):
        mask[row, : row % 3] = False
        mask[row, tokens - row % 2 :] = False
    return torch.randint(3, 40, (rows, tokens), generator=torch.Generator().manual_seed(seed)), mask


def read(roles: Roles, ids: torch.Tensor, mask: torch.Tensor, keep: int) -> list[torch.Tensor]:
    """What a minibatch reads, and the gradients it leaves, those of the minibatches before included."""
    logprobs, entropies, values = roles.policy_tokens(ids, mask, keep, 0.7)
    (logprobs.sum() + values.square().sum()).backward()
    learned = [*roles.policy_parameters().values(), *roles.critic_parameters().values()]
    reference = roles.reference_logprobs(ids, mask, keep, 0.7)
    return [logprobs.detach(), entropies, values.detach(), reference, *(p.grad.clone() for p in learned)]


@pytest.mark.parametrize("critic", ["shared", "adapter", "none"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_captured_passes_say_and_learn_what_plain_ones_do(tiny_causal, graphs, kind, critic):
    roles = roles_of(tiny_causal, kind, critic)
    batches = [(batch(rows, tokens, seed), keep) for seed in range(3) for rows, tokens, keep in SHAPES]
    plain = [read(roles, *given, keep) for given, keep in batches]
    for parameter in (roles.policy_parameters() | roles.critic_parameters()).values():
        parameter.grad = None
    roles.captured = CapturedStates(trunk(roles.model), roles.device)
    replayed = [read(roles, *given, keep) for given, keep in batches]
    assert len(roles.captured.passes) == (6 if critic == "adapter" else 4)
    assert all(one.graphs for one in roles.captured.passes.values())
    for one, other in zip(itertools.chain(*replayed), itertools.chain(*plain), strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-5


def test_a_pass_has_one_backward_before_the_next_of_its_role(tiny_causal, graphs):
    roles = roles_of(tiny_causal, "gpt2", "none")
    roles.captured = CapturedStates(trunk(roles.model), roles.device)
    given = batch(3, 9, 0)
    roles.policy_tokens(*given, 4)[0].sum().backward()
    first = roles.policy_tokens(*given, 4)[0].sum()
    second = roles.policy_tokens(*given, 4)[0].sum()
    with pytest.raises(RuntimeError, match="another pass of this role"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="it has had one"):
        second.backward()


def test_what_a_replay_gives_holds_no_node_of_what_learns(tiny_causal, graphs):
    """Such a node belongs to the replay's stream, and until it ends no other kind can be captured on theirs."""
    roles = roles_of(tiny_causal, "llama", "none")
    roles.captured = CapturedStates(trunk(roles.model), roles.device)
    given = batch(3, 9, 0)
    for _ in range(2):
        roles.policy_tokens(*given, 4)[0].sum().backward()
    said, held = roles.policy_tokens(*given, 4)[0], []  # torch 2.11 forgets the nodes of what nobody holds
    waiting = [said.grad_fn]
    while waiting:
        node = waiting.pop()
        held += [node.variable] if hasattr(node, "variable") else []
        waiting += [following for following, _ in node.next_functions if following is not None]
    assert held and not {id(leaf) for leaf in held} & {id(p) for p in roles.policy_parameters().values()}


def trained(policy, batches) -> list[torch.Tensor]:
    """Losses of batches of (ids, positions), and the gradients that they leave together."""
    losses = []
    for ids, positions in batches:
        loss = policy(input_ids=ids, position_ids=positions, labels=ids, num_items_in_batch=torch.tensor(9)).loss
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in policy.parameters() if p.requires_grad)]


DOCUMENTS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 1, 2, 3, 4, 0]])  # positions, two and three documents
PACKED = [(torch.randint(3, 40, (2, n), generator=torch.Generator().manual_seed(n)), n) for n in (8, 8, 5, 7, 8)]


def learner(causal, kind: str, dropout: float) -> nn.Module:
    model, _ = causal(kind)
    model.config.use_cache = False
    policy = attach(model, Lora(r=3, alpha=6), "policy").train()
    torch.manual_seed(0)
    require_gradients(adapter_parameters(policy, "policy"))
    for parameter in adapter_parameters(policy, "policy").values():
        nn.init.normal_(parameter, std=0.3)
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return policy


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_rows_are_learned_from_by_replays_as_without(tiny_causal, graphs, kind):
    policy = learner(tiny_causal, kind, 0.0)
    batches = [(ids, DOCUMENTS[:, :n]) for ids, n in PACKED]
    expected = [tensor.clone() for tensor in trained(policy, batches)]
    policy.zero_grad()
    with replayed_passes(policy) as captured:
        found = trained(policy, batches)
    assert [len(one.graphs) for one in captured.passes.values()] == [2]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-5


def test_a_pass_with_a_mask_is_not_replayed(tiny_causal, graphs):
    policy = learner(tiny_causal, "gpt2", 0.0)
    ids, mask = PACKED[0][0], torch.ones(2, 8, dtype=torch.long)
    mask[:, :3] = 0
    given = {"input_ids": ids, "position_ids": DOCUMENTS, "attention_mask": mask}
    expected = policy(**given).logits[:, 3:]
    assert not torch.allclose(expected, policy(input_ids=ids, position_ids=DOCUMENTS).logits[:, 3:], atol=1e-3)
    with replayed_passes(policy) as captured:
        torch.testing.assert_close(policy(**given).logits[:, 3:], expected)
    assert not captured.passes


def test_a_reward_model_scores_by_replays_as_without(tiny_causal, graphs):
    model, tokenizer = tiny_causal("llama")
    net = RewardNet.fresh(Backbone("tiny", model, tokenizer, ""), Lora(r=3, alpha=6), members=2)
    for member in range(2):
        for parameter in net.learned(member).values():
            nn.init.normal_(parameter, std=0.3)
    batches = [batch(rows, tokens, seed) for seed in range(3) for rows, tokens, _ in SHAPES]
    found = []
    for captured_states in (None, CapturedStates(trunk(net.model), torch.device("cpu"))):
        net.captured = captured_states
        for member in (0, 1, 0):
            net.use(member)
            found += [net.score(*given) for given in batches]
    assert net.captured is not None and all(one.graphs for one in net.captured.passes.values())
    kinds = len(net.captured.passes)
    net.score(*(part.repeat(captured.CAPTURED_TOKENS // part.numel() + 1, 1) for part in batches[0]))
    assert len(net.captured.passes) == kinds, "a pass that large is run as it is"
    half = len(found) // 2
    torch.testing.assert_close(found[half:], found[:half], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[len(batches)], atol=1e-2), "members differ"


def test_kinds_beyond_their_number_are_forgotten(tiny_causal, graphs, monkeypatch):
    monkeypatch.setattr(captured, "KINDS", 3)
    roles = roles_of(tiny_causal, "gpt2", "none")
    roles.captured = CapturedStates(trunk(roles.model), roles.device)
    for rows in (8, 16, 24, 32):
        roles.reference_logprobs(*batch(rows, 9, 0), 4)
    assert [kind[2] for kind in roles.captured.passes] == [32]


def test_only_what_a_graph_can_hold_is_captured(tiny_causal):
    assert all(capturable(tiny_causal(kind)[0]) for kind in ("gpt2", "llama"))
    model, _ = tiny_causal("llama")
    model.model.rotary_emb.rope_type = "dynamic"  # asks the device how long the text is
    assert not capturable(model)
    model, _ = tiny_causal("gpt2")
    model.config._attn_implementation = "eager"
    assert not capturable(model)
    plain, variant = (attach(tiny_causal("gpt2")[0], LoraVariants(r=3, dora=dora), "policy") for dora in (False, True))
    assert replayable(plain) and not replayable(variant)
    assert bucket(3, 9) == (8, 16) and bucket(8, 130) == (8, 160)
