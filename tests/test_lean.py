"""Lean passes: the numbers and gradients of the plain ones, and less kept between forward and backward."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_quick import IDS, MASK, adapted
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peftlab.models import lean as lean_module
from peftlab.models.adapters import Lora, adapter_parameters, attach
from peftlab.models.backbone import Backbone, causal_logits, trunk
from peftlab.models.lean import ATTENTION, _Again, _Rotated, attend_in_full, attention, keep_less, recompute
from peftlab.models.roles import Roles
from peftlab.ops.masks import position_ids

pytestmark = pytest.mark.usefixtures("one_thread")


def passed(model) -> tuple[list[torch.Tensor], Counter[int], int]:
    """States and gradients of a pass with a mask of four dimensions, as captured passes bring it; what was kept
    meanwhile, by its size in numbers; and of how many norms the output was."""
    model.zero_grad()
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & MASK[:, None, None] | torch.eye(7, dtype=torch.bool)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    body = model.get_base_model().base_model
    normed: list[torch.Tensor] = []
    norms = [module for module in body.modules() if isinstance(module, LlamaRMSNorm | nn.LayerNorm)]
    hooks = [norm.register_forward_hook(lambda module, given, output: normed.append(output)) for norm in norms]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = body(
            input_ids=IDS, attention_mask=causal, position_ids=position_ids(MASK), use_cache=False
        ).last_hidden_state
    fixed = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for hook in hooks:
        hook.remove()
    outputs = sum(output.untyped_storage().data_ptr() in kept for output in normed)
    sizes = Counter(size for pointer, size in kept.items() if pointer not in fixed)
    slopes = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    (states * slopes)[MASK].sum().backward()
    return [states[MASK].detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)], sizes, outputs


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_lean_passes_say_and_learn_what_plain_ones_do_and_keep_less(tiny_causal, architecture):
    model = adapted(tiny_causal, architecture)
    plain, much, norms = passed(model)
    attend_in_full(model.get_base_model())
    keep_less(model.get_base_model())
    ours, little, fewer = passed(model)
    assert len(ours) == len(plain) > 8
    for one, other in zip(ours, plain, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    wide = IDS.numel() * (4 * width if architecture == "gpt2" else model.config.intermediate_size)
    # An activation's input, or gate and up; beside their output, of the latter also silu(gate).
    assert (much[wide], little[wide]) == ((2 * layers, layers) if architecture == "gpt2" else (4 * layers, 2 * layers))
    # The first norm's input needs no gradient, so there its output is kept.
    assert (norms, fewer) == (2 * layers, 1)


def test_tensors_of_inference_mode_which_have_no_version_pass(tiny_causal):
    model = adapted(tiny_causal, "llama")
    keep_less(model.get_base_model())
    before = causal_logits(model, IDS, MASK, 3).detach()
    with torch.inference_mode():
        torch.testing.assert_close(causal_logits(model, IDS, MASK, 3), before)


def test_what_changed_since_it_was_made_is_kept_itself(tiny_causal):
    model = tiny_causal("gpt2")[0]
    keep_less(model)
    made = model.transformer.ln_f(torch.randn(3, model.config.n_embd, requires_grad=True))
    make, made_of = recompute(made)
    assert torch.equal(make(*made_of), made) and made_of[0] is not made
    made.add_(1)
    make, made_of = recompute(made)
    assert torch.equal(make(*made_of), made)


@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)])
def test_a_mask_of_two_dimensions_is_taken(tiny_causal, monkeypatch, mask):
    """Of one without padding transformers makes none at all."""
    model = adapted(tiny_causal, "llama")
    before = causal_logits(model, IDS, mask, 3)
    attend_in_full(model.get_base_model())
    monkeypatch.setattr(lean_module, "sdpa_attention_forward", None)
    torch.testing.assert_close(causal_logits(model, IDS, mask, 3), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2)])
def test_attention_of_short_rows_is_sdpa(monkeypatch, heads, shared):
    torch.manual_seed(0)
    query = torch.randn(3, 5, heads, 8).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(3, shared, 5, 8, requires_grad=True) for _ in range(2))
    seen = torch.rand(3, 1, 5, 5) < 0.5
    seen |= torch.eye(5, dtype=torch.bool)
    slopes = torch.randn(3, 5, heads, 8)

    def told(made: torch.Tensor) -> list[torch.Tensor]:
        return [made.detach(), *torch.autograd.grad(made, (query, key, value), slopes)]

    monkeypatch.setattr(lean_module, "sdpa_attention_forward", None)
    ours = told(attention(torch.nn.Module(), query, key, value, seen, scaling=0.3)[0])
    each = [part.repeat_interleave(heads // shared, 1) for part in (key, value)]
    theirs = told(scaled_dot_product_attention(query, *each, attn_mask=seen, scale=0.3).transpose(1, 2))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("rope", "expected"), [("default", ATTENTION), ("dynamic", "sdpa")])
def test_training_changes_the_attention_of_classes_it_knows_alone(tiny_causal, rope, expected):
    model, tokenizer = tiny_causal("llama")
    model.model.rotary_emb.rope_type = rope
    roles = Roles(Backbone("tiny", model, tokenizer, ""), Lora(r=3), "none")
    roles.quicken()
    assert roles.model.config._attn_implementation == expected
    assert roles.twin.config._attn_implementation == expected


def test_what_is_not_short_float32_rows_with_a_mask_goes_to_sdpa(monkeypatch):
    monkeypatch.setattr(lean_module, "sdpa_attention_forward", lambda *_, **__: "sdpa")
    x = torch.zeros(1, 2, 4, 8)
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    long, whole = torch.zeros(1, 2, 49, 8), torch.ones(1, 1, 49, 49, dtype=torch.bool)
    others = {
        "no mask": (x, x, None, {}),
        "bfloat16": (x.bfloat16(), x.bfloat16(), seen, {}),
        "one query": (x[:, :, :1], x[:, :, :1], seen[:, :, :1, :1], {}),
        "a query for many": (x[:, :, :1], x, seen[:, :, :1], {}),
        "a bias": (x, x, seen, {"position_bias": x}),
        "a cap": (x, x, seen, {"softcap": 30.0}),
        "numbers to be added": (x, x, seen.float(), {}),
        "long": (long, long, whole, {}),
        "dropout": (x, x, seen, {"dropout": 0.1}),
    }
    for what, (query, key, mask, given) in others.items():
        assert attention(torch.nn.Module(), query, key, key, mask, **given) == "sdpa", what
    assert attention(torch.nn.Module(), x, x, x, seen)[0].shape == (1, 4, 2, 8)
    assert ATTENTION in lean_module.ALL_ATTENTION_FUNCTIONS


def test_queries_and_keys_are_rounded_once_under_autocast():
    x, angles = torch.randn(2, 5, 3, 8).bfloat16(), torch.randn(2, 1, 5, 4).repeat(1, 1, 1, 2)
    made = _Rotated.apply(x, angles.cos(), angles.sin())
    exact = _Rotated.apply(x.double(), angles.double().cos(), angles.double().sin())
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, exact.bfloat16(), atol=1e-6, rtol=2**-8)


def test_lean_attention_with_a_cache_is_transformers(tiny_causal):
    model, _ = tiny_causal("llama")
    given = {"input_ids": IDS, "attention_mask": MASK, "position_ids": position_ids(MASK)}
    expected = model(**given, use_cache=True)
    keep_less(model)
    made = model(**given, use_cache=True)
    torch.testing.assert_close(made.logits[MASK], expected.logits[MASK])
    for one, other in zip(made.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close((one.keys, one.values), (other.keys, other.values))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_what_several_layers_read_is_made_again_once(tiny_causal, monkeypatch, architecture):
    """Two norms and an activation a block, though five layers of a Llama-class one read the norms; less the first norm,
    whose input does not learn, so that it is kept as it is."""
    made, every, init = [], [], _Again.__init__

    def counting(self: _Again, make) -> None:
        every.append(self)
        init(self, lambda *given: (made.append(1), make(*given))[1])

    monkeypatch.setattr(_Again, "__init__", counting)
    model, _ = tiny_causal(architecture)
    learner = attach(model, Lora(r=3), "policy")
    keep_less(model)
    learned = adapter_parameters(learner, "policy").values()
    for parameter in learned:
        nn.init.normal_(parameter.requires_grad_(True), std=0.1)
    states = trunk(learner)(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.autograd.grad(states.sum(), list(learned))
    assert len(made) == 3 * model.config.num_hidden_layers - 1
    assert all(one.made is None for one in every), "and nobody keeps it"
