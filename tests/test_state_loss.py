"""The loss of a frozen head's states is transformers' loss of their logits, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftlab.data.tokenize import IGNORED
from peftlab.models.adapters import Lora, adapter_parameters, attach
from peftlab.models.backbone import unembedding
from peftlab.ops.logprobs import state_logprobs
from peftlab.ops.split import AlignedHead
from peftlab.recipes.common import require_gradients
from peftlab.training.state_loss import loss_from_states

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 1], [10, 11, 12, 13, 14, 15, 16, 17]])
LABELS = torch.where(torch.arange(8) < torch.tensor([[4], [0]]), IGNORED, IDS)


def learner(causal, architecture: str) -> nn.Module:
    model, _ = causal(architecture)
    torch.manual_seed(0)
    policy = attach(model, Lora(r=3, alpha=6), "policy")
    learned = adapter_parameters(policy, "policy")
    require_gradients(learned)
    for parameter in learned.values():
        nn.init.normal_(parameter, std=0.3)
    return policy


def loss_and_gradients(policy: nn.Module, **given) -> list[torch.Tensor]:
    loss = policy(input_ids=IDS, labels=LABELS, **given).loss
    learned = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return [loss, *torch.autograd.grad(loss, learned)]


@pytest.mark.parametrize("given", [{}, {"num_items_in_batch": torch.tensor(5)}])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_is_the_loss_of_the_logits(tiny_causal, architecture, given):
    policy = learner(tiny_causal, architecture)
    expected = loss_and_gradients(policy, **given)
    with loss_from_states(policy):
        width = policy(input_ids=IDS, labels=LABELS).logits.shape[-1]
        assert width == policy.config.hidden_size, "no logits are made"
        found = loss_and_gradients(policy, **given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(loss_and_gradients(policy, **given)[0], expected[0]), "afterwards it makes logits again"


def test_dropout_does_not_hide_a_plain_head(tiny_causal):
    model, _ = tiny_causal("gpt2")
    policy = attach(model, Lora(r=3, alpha=6, dropout=0.5), "policy")
    for parameter in adapter_parameters(policy, "policy").values():
        nn.init.normal_(parameter, std=0.3)
    policy.train()
    with loss_from_states(policy):
        assert policy(input_ids=IDS, labels=LABELS).logits.shape[-1] == policy.config.hidden_size
    assert all(module.training for module in policy.modules())


def test_a_batch_without_a_label_has_no_mean(tiny_causal):
    policy = learner(tiny_causal, "gpt2")
    with loss_from_states(policy):
        assert policy(input_ids=IDS, labels=torch.full_like(IDS, IGNORED)).loss.isnan()


def test_a_head_that_learns_keeps_its_logits(tiny_causal):
    policy = learner(tiny_causal, "llama")
    policy.get_base_model().get_output_embeddings().weight.requires_grad_(True)
    with loss_from_states(policy):
        output = policy(input_ids=IDS, labels=LABELS)
    assert output.logits.shape[-1] == policy.config.vocab_size and output.loss.requires_grad


def test_a_head_that_does_more_than_multiply_keeps_its_logits(tiny_causal, monkeypatch):
    policy = learner(tiny_causal, "llama")
    head = policy.get_base_model().get_output_embeddings()
    head.bias = nn.Parameter(torch.ones(head.out_features), requires_grad=False)
    expected = loss_and_gradients(policy)
    assert unembedding(policy.get_base_model()) is None
    with loss_from_states(policy):
        torch.testing.assert_close(loss_and_gradients(policy), expected, rtol=0, atol=0)


@pytest.mark.parametrize("words", [13, 16])
def test_an_aligned_head_gives_words_beyond_its_own_no_chance(words):
    torch.manual_seed(words)
    states, head, tokens = torch.randn(6, 8, requires_grad=True), torch.randn(words, 8), torch.arange(6)
    expected, found = state_logprobs(states, head, tokens), state_logprobs(
        states, head, tokens, quick=AlignedHead(head, torch.float32)
    )
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(logprobs.sum(), states)[0] for logprobs, _ in (found, expected)]
    torch.testing.assert_close(*slopes)
