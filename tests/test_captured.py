"""What a decoding step and a captured pass are made of, as far as a CPU can tell."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from peftlab.models.captured import bucket, capturable
from peftlab.sampling.attention import few_queries


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
