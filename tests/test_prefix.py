"""The encoder-decoder prefix: what it may change, what it may not, and what it costs nothing."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import causal, one_thread, seq2seq, seq2seq_folder

from peftlab.errors import UserError
from peftlab.models.adapter_files import load_adapter, load_stack, save_adapter
from peftlab.models.adapters import attach_decoder_prefix
from peftlab.models.backbone import fingerprint
from peftlab.models.prefix import attach_prefix, attentions, own_prefix, prefix_shapes, word_states
from peftlab.models.stacks import Stack
from peftlab.runs.checkpoint import write_manifest

LENGTH = 5


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def tokens(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (rows, width), generator=torch.Generator().manual_seed(seed))


def batch() -> dict[str, torch.Tensor]:
    """Two documents, the second padded, and their summaries."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": tokens(2, 9), "attention_mask": mask, "labels": tokens(2, 6, seed=1)}


def start(model: Any, length: int = LENGTH, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Random keys and values of the model's shapes."""
    draw = torch.Generator().manual_seed(2)
    return {k: scale * torch.randn(s, generator=draw) for k, s in prefix_shapes(model, length).items()}


def prefixed(hidden: int = 0, **changes: Any) -> Any:
    """A T5 with a prefix that does something, its reparametrization included."""
    torch.manual_seed(0)
    model = seq2seq(**changes)
    prefix = attach_prefix(model, start(model), hidden)
    if hidden:
        with torch.no_grad():
            for part in prefix.parts().values():
                part.mlp.up.normal_(std=0.2)
    return model


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}])
def test_a_prefix_of_no_length_is_the_bare_model(changes):
    model = seq2seq(**changes)
    bare = copy.deepcopy(model)
    attach_prefix(model, start(model, length=0))
    ours, theirs = model(**batch()), bare(**batch())
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.encoder_last_hidden_state, theirs.encoder_last_hidden_state)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
def test_each_kind_acts_where_it_stands(kind):
    """A prefix in one kind of attention alone: the encoder's output moves with the encoder's, the logits with each."""
    model = seq2seq()
    bare = copy.deepcopy(model)
    states = start(model)
    attach_prefix(model, {k: v if k == kind else v[:, :, :, :0] for k, v in states.items()})
    ours, theirs = model(**batch()), bare(**batch())
    moved = (ours.encoder_last_hidden_state - theirs.encoder_last_hidden_state).abs().max()
    assert (moved > 0.01) == (kind == "encoder")
    assert (ours.logits - theirs.logits).abs().max() > 0.01


def test_pefts_prefix_leaves_the_encoder_alone():
    model = seq2seq()
    bare = copy.deepcopy(model)
    wrapped = attach_decoder_prefix(model, LENGTH, 0, "policy")
    ours, theirs = wrapped(**batch()), bare(**batch())
    assert torch.equal(ours.encoder_last_hidden_state, theirs.encoder_last_hidden_state)
    assert (ours.logits - theirs.logits).abs().max() > 0.001


def mixed(model: Any, place: Any) -> torch.Tensor:
    """What an attention hands to its output layer, for one batch."""
    seen = []
    hook = place.o.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(**batch())
    hook.remove()
    return seen[0]


def silent(kind: str, length: int, plain: bool = False) -> torch.Tensor:
    """(B, Q, H * D): 1 / what one attention mixes behind `length` prefix keys and values of 0.

    They add `length` x exp(0 + bias) to the softmax's sum Z and nothing to what it weighs, N: it is (Z + ...) / N.
    `plain`: queries are 0 and the position bias is log 2 everywhere.
    """
    model = seq2seq(num_layers=1, num_decoder_layers=1).double()
    attach_prefix(model, {**start(model, 0), kind: start(model, length, scale=0.0)[kind]})
    place = attentions(model)[kind][0]
    with torch.no_grad():
        if plain:
            place.q.weight.zero_()
            if place.has_relative_attention_bias:
                place.relative_attention_bias.weight.fill_(math.log(2))
    return 1 / mixed(model, place)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
def test_a_prefix_leaves_the_bias_of_the_tokens(kind):
    """Then 1 / output is a line in the length of the prefix. Were the tokens' bias shifted by it, it would bend."""
    bare, one, two, many = (silent(kind, length) for length in (0, 1, 2, 30))
    assert torch.allclose(two - one, one - bare, rtol=1e-6)
    assert torch.allclose(many - bare, 30 * (one - bare), rtol=1e-6)


@pytest.mark.parametrize("kind, seen", [
    ("encoder", [2 * torch.full((9,), 9), 2 * torch.full((9,), 6)]),
    ("decoder", [2 * torch.arange(1, 7)] * 2),
    ("cross", [torch.full((6,), 9), torch.full((6,), 6)]),
])
def test_a_prefix_has_a_bias_of_0(kind, seen):
    """Where each visible token weighs exp(0 + log 2) (1 in the cross-attention, which has no bias), Z counts them in
    units of what a prefix position weighs: exp(0 + 0)."""
    bare, one = (silent(kind, length, plain=True) for length in (0, 1))
    count = torch.stack(seen)[:, :, None].double()
    assert torch.allclose(bare / (one - bare), count.expand_as(bare), rtol=1e-6)


def test_the_order_within_a_prefix_means_nothing():
    model = prefixed()
    shuffled = seq2seq()
    order = torch.tensor([3, 1, 4, 0, 2])
    attach_prefix(shuffled, {kind: states[:, :, :, order] for kind, states in own_prefix(model).tensors().items()})
    assert torch.allclose(model(**batch()).logits, shuffled(**batch()).logits, atol=1e-5)


def test_padding_changes_nothing():
    model = prefixed()
    alone = model(input_ids=tokens(2, 9)[1:, :6], labels=batch()["labels"][1:]).logits
    assert torch.allclose(model(**batch()).logits[1:], alone, atol=1e-5)


def test_cached_decoding_is_the_full_forward():
    """The logits of each step with the key/value cache are those of one pass over the whole answer."""
    model = prefixed()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    made = model.generate(**inputs, max_new_tokens=7, min_new_tokens=7, output_logits=True,
                          return_dict_in_generate=True)
    full = model(**inputs, decoder_input_ids=made.sequences[:, :-1]).logits
    assert torch.allclose(torch.stack(made.logits, 1), full, atol=1e-4)
    assert made.past_key_values.get_seq_length() == 7  # the prefix does not lengthen the cache


def test_beams():
    """One beam takes the likeliest token each time; more beams find another, more likely answer, with or without cache.
    """
    lively = {"initializer_factor": 2.0}  # with usual weights it says the same token over and over
    model = prefixed(**lively)
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    greedy = model.generate(**inputs, **options)
    likeliest = torch.zeros(2, 1, dtype=torch.long)  # the decoder's start
    for _ in range(8):
        logits = model(**inputs, decoder_input_ids=likeliest, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf  # min_new_tokens
        likeliest = torch.cat([likeliest, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, likeliest)
    wide = model.generate(**inputs, num_beams=4, **options)
    assert torch.equal(wide, model.generate(**inputs, num_beams=4, use_cache=False, **options))

    def nats(answers: torch.Tensor) -> torch.Tensor:
        logp = model(**inputs, decoder_input_ids=answers[:, :-1]).logits.log_softmax(-1)
        return logp.gather(-1, answers[:, 1:, None]).sum((1, 2))

    assert (nats(wide) >= nats(greedy) - 1e-4).all() and not torch.equal(wide, greedy)
    bare = seq2seq(**lively).generate(**inputs, num_beams=4, **options)
    assert not torch.equal(wide, bare)


@pytest.mark.parametrize("hidden", [0, 16])
def test_only_the_prefix_has_gradients(hidden):
    model = prefixed(hidden)
    model(**batch()).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"prefix.{name}" for name, _ in model.prefix.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == (name in learning), name


def test_folding_keeps_every_bit():
    model = prefixed(hidden=16)
    before, count = model(**batch()).logits, len(list(model.prefix.parameters()))
    model.prefix.fold()
    assert torch.equal(model(**batch()).logits, before)
    assert len(list(model.prefix.parameters())) == 3 < count


def test_the_reparametrization_starts_as_nothing():
    with_mlp, without = seq2seq(), seq2seq()
    attach_prefix(with_mlp, start(with_mlp), hidden=16)
    attach_prefix(without, start(without))
    assert torch.equal(with_mlp(**batch()).logits, without(**batch()).logits)


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_the_same_gradients(options):
    plain, saving = prefixed(hidden=16).train(), prefixed(hidden=16).train()
    saving.activation_checkpointing_enable(options)
    for model in (plain, saving):
        model(**batch(), use_cache=False).loss.backward()
    theirs = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-6), name


def test_word_states_are_what_attention_sees_of_words():
    """A decoder that reads `a b` answers as one that reads `b` behind a prefix of `a`, where positions do not count."""
    model = seq2seq()
    with torch.no_grad():  # no position bias, so that only content counts
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    words, said = tokens(1, LENGTH), tokens(1, LENGTH, seed=3)
    whole = torch.cat([said, tokens(1, 3, seed=4)], 1)
    expected = model(input_ids=words, decoder_input_ids=whole).logits[:, LENGTH:]
    states = word_states(model, words, said)
    assert {kind: tuple(v.shape) for kind, v in states.items()} == prefix_shapes(model, LENGTH)
    attach_prefix(model, {k: v if k == "decoder" else v[:, :, :, :0] for k, v in states.items()})
    assert torch.allclose(model(input_ids=words, decoder_input_ids=whole[:, LENGTH:]).logits, expected, atol=1e-4)


@torch.no_grad()
def test_autocast_to_bfloat16_rounds_and_no_more():
    model = prefixed()
    expected = model(**batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        difference = (model(**batch()).logits.float() - expected).abs()
    assert difference.mean() < 0.02 * expected.abs().mean()


def test_models_that_are_no_t5_are_refused():
    model, _ = causal()
    with pytest.raises(UserError, match="prefix-full: works on T5 models"):
        attach_prefix(model, {})
    with pytest.raises(UserError, match="prefix: works on T5 models"):
        attach_decoder_prefix(model, LENGTH, 0, "policy", "some-gpt2")


@pytest.fixture
def saved(tmp_path):
    """(folder of the base, folder of an adapter, the logits that it must give)."""
    base = seq2seq_folder(tmp_path / "base")
    model = prefixed(hidden=16)
    expected = model(**batch()).logits
    mark = fingerprint(seq2seq())
    stack = Stack("seq2seq", str(base), mark, extra={"beams": 3})
    return base, save_adapter(model, "policy", tmp_path / "adapter", stack), expected


def test_saved_and_loaded_it_gives_the_same_logits(saved):
    _, folder, expected = saved
    files = {"adapter_config.json", "manifest.json", "prefix.safetensors", "stack.json"}
    assert {file.name for file in folder.iterdir()} == files
    backbone, stack = load_stack(str(folder), device="cpu")
    assert torch.equal(backbone.model(**batch()).logits, expected)
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert (stack.kind, stack.extra["beams"]) == ("seq2seq", 3)
    assert set(load_file(folder / "prefix.safetensors")) == {"encoder", "decoder", "cross"}


def rewrite(folder: Any, change: Any) -> None:
    """Change the tensors of an adapter as one who also mends the manifest."""
    tensors = load_file(folder / "prefix.safetensors")
    change(tensors)
    save_file(tensors, folder / "prefix.safetensors")
    write_manifest(folder)


@pytest.mark.parametrize("change, reason", [
    (lambda t: t.pop("cross"), "lacks cross"),
    (lambda t: t.update(extra=t["cross"].clone()), "unknown tensor extra"),
    (lambda t: t.update(cross=t["cross"][:, :, :, 1:].clone()), r"cross is \(2, 2, 4, 4, 12\), expected"),
    (lambda t: t["encoder"].fill_(float("nan")), "encoder holds NaN"),
])
def test_what_is_wrong_with_it_is_named(saved, change, reason):
    _, folder, _ = saved
    rewrite(folder, change)
    with pytest.raises(UserError, match=reason):
        load_stack(str(folder), device="cpu")


def test_damage_and_other_bases_are_refused(saved, tmp_path):
    _, folder, _ = saved
    with pytest.raises(UserError, match="is another one"):
        load_adapter(seq2seq(seed=5), folder, "policy", fingerprint(seq2seq(seed=5)))
    about = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**about, "num_virtual_tokens": "many"}))
    with pytest.raises(UserError, match="adapter_config.json"):
        load_stack(str(folder), device="cpu")
    write_manifest(folder)
    with pytest.raises(UserError, match="num_virtual_tokens"):
        load_stack(str(folder), device="cpu")
    (folder / "prefix.safetensors").unlink()
    write_manifest(folder)
    with pytest.raises(UserError, match="no prefix.safetensors"):
        load_stack(str(folder), device="cpu")


def test_labels_that_are_no_list_are_refused(saved):
    _, folder, _ = saved
    stack = json.loads((folder / "stack.json").read_text())
    (folder / "stack.json").write_text(json.dumps({**stack, "labels": 7}))
    write_manifest(folder)
    with pytest.raises(UserError, match="labels 7"):
        load_stack(str(folder), device="cpu")


def test_peft_refuses_the_folder(saved):
    """Another tool must not read it as something that it is not."""
    from peft import PeftConfig

    _, folder, _ = saved
    with pytest.raises((KeyError, ValueError)):
        PeftConfig.from_pretrained(str(folder))


@pytest.mark.parametrize("hidden", [0, 16])
def test_pefts_prefix_is_saved_and_loaded(tmp_path, hidden):
    base = seq2seq_folder(tmp_path / "base")
    model = attach_decoder_prefix(seq2seq(), LENGTH, hidden, "policy", str(base))
    expected = model(**batch()).logits
    folder = save_adapter(model, "policy", tmp_path / "a", Stack("seq2seq", str(base), fingerprint(seq2seq())))
    backbone, _ = load_stack(str(folder), device="cpu")
    assert torch.allclose(backbone.model(**batch()).logits, expected, atol=1e-5)
    assert not any(p.requires_grad for p in backbone.model.parameters())
