"""Products by the quicker library are the plain ones up to rounding, and taken only where no gradient is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peftlab.models import quick_layers
from peftlab.models.backbone import causal_logits
from peftlab.models.captured import bucket, capturable
from peftlab.models.quick_layers import QuickConv1D, QuickLinear, quicken_layers
from peftlab.ops.products import product
from peftlab.sampling.attention import few_queries

IDS = torch.tensor([[0, 0, 5, 6, 7, 8, 1], [3, 4, 5, 9, 10, 11, 12]])
MASK = torch.tensor([[False, False, True, True, True, True, False], [True] * 7])


@given(
    st.sampled_from([(), (0,), (1,), (3, 2), (65,)]), st.integers(1, 70), st.integers(1, 70), st.booleans(),
    st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_product_is_that_of_a_linear_layer(rows, inputs, outputs, turned, biased, dtype):
    torch.manual_seed(inputs + 71 * outputs)
    x = torch.randn(*rows, inputs, dtype=dtype)
    weight = torch.randn(inputs, outputs, dtype=dtype).t() if turned else torch.randn(outputs, inputs, dtype=dtype)
    bias = torch.randn(outputs, dtype=dtype) if biased else None
    made = product(x, weight, bias)
    assert made.shape == (*rows, outputs) and made.dtype == dtype
    torch.testing.assert_close(made, F.linear(x, weight, bias), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_quickened_model_says_the_same(tiny_causal, architecture, monkeypatch):
    model, _ = tiny_causal(architecture)
    before, state = causal_logits(model, IDS, MASK, 3), model.state_dict()
    quicken_layers(model.requires_grad_(False))
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)} <= {QuickLinear, QuickConv1D}
    assert model.state_dict().keys() == state.keys()
    with torch.no_grad():
        torch.testing.assert_close(causal_logits(model, IDS, MASK, 3), before, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(quick_layers, "product", lambda *_: pytest.fail("took what learns, or another dtype"))
    model.requires_grad_(True)
    causal_logits(model, IDS, MASK, 3).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        causal_logits(model, IDS, MASK, 3)
    with pytest.raises(RuntimeError), torch.no_grad():  # torch's own words for a layer of another dtype
        next(m for m in model.modules() if isinstance(m, QuickLinear))(torch.zeros(1, 1, dtype=torch.float64))


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_few_queries_attend_as_many_do(rows, groups, queries, slots, dtype):
    torch.manual_seed(rows + 5 * slots)
    query = torch.randn(rows, groups, queries, 8, dtype=dtype)
    keys, values = torch.randn(2, rows, groups, slots + 3, 8, dtype=dtype)[..., :slots, :]
    unseen = torch.where(torch.rand(rows, 1, 1, slots) < 0.4, -1e30, 0.0).to(dtype)
    unseen[..., -1] = 0
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=unseen.expand(-1, groups, queries, -1))
    torch.testing.assert_close(few_queries(query, keys, values, unseen), expected, atol=1e-5, rtol=1e-5)


def test_only_what_a_graph_can_hold_is_captured(tiny_causal):
    assert all(capturable(tiny_causal(kind)[0]) for kind in ("gpt2", "llama"))
    model, _ = tiny_causal("llama")
    model.model.rotary_emb.rope_type = "dynamic"  # asks the device how long the text is
    assert not capturable(model)
    model, _ = tiny_causal("gpt2")
    model.config._attn_implementation = "eager"
    assert not capturable(model)
    assert bucket(3, 9) == (8, 16) and bucket(8, 130) == (8, 160)
