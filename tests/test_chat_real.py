"""Switching, mixing and comparing on the two models that a person meets first, each with its own tokenizer."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peftlab.chat.session import Session, default_decoding
from peftlab.chat.terminal import Terminal
from peftlab.chat.voices import Cast
from peftlab.data.records import Message
from peftlab.models.adapter_files import save_adapter
from peftlab.models.adapters import Lora, attach
from peftlab.models.backbone import load_backbone
from peftlab.models.stacks import Stack

ASKED = [Message("user", "This film is")]


@pytest.fixture(scope="module", params=["tiny-gpt2", "smollm2-135m"])
def opened(request, tmp_path_factory) -> tuple[Cast, str, dict[str, str]]:
    """Who is in memory, the base's name, and two adapters of it, "loud" and "low": drawn, not trained."""
    base, place = request.param, tmp_path_factory.mktemp("adapters")
    cast, made = Cast("cpu"), {}
    for seed, name in enumerate(("loud", "low")):
        backbone = load_backbone(base, device="cpu")
        model = attach(backbone.model, Lora(r=2, alpha=4), "policy", base=base)
        draw = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if ".lora_B" in key:
                parameter.data.normal_(std=0.02, generator=draw)
        made[name] = str(save_adapter(model, "policy", place / name, Stack("causal", base, backbone.fingerprint)))
    return cast, base, made


def logits(voice) -> torch.Tensor:
    """What the voice holds of the next token, (V,)."""
    voice.act()
    ids = voice.sampler.tokenizer(voice.text(ASKED), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return voice.sampler.model(torch.tensor([ids])).logits[0, -1]


def test_voices_of_one_base_are_what_their_weights_say(opened):
    cast, base, made = opened
    bare = cast.stack(base)
    before = logits(bare)
    loud, low = (cast.stack(folder) for folder in made.values())
    assert loud.sampler is low.sampler is bare.sampler, "one base in memory"
    assert not torch.allclose(logits(loud), logits(low), atol=1e-2)
    assert torch.equal(logits(cast.off(loud)), before)
    whole = cast.mix(bare, {made["loud"]: 1.0, made["low"]: 0.0})
    assert torch.allclose(logits(whole), logits(loud), atol=1e-4)
    half = logits(cast.mix(bare, dict.fromkeys(made.values(), 0.5)))
    assert not torch.allclose(half, logits(loud), atol=1e-2) and not torch.allclose(half, before, atol=1e-2)


def test_a_conversation_switches_mixes_and_compares(opened, monkeypatch):
    cast, base, made = opened
    monkeypatch.chdir(Path(made["loud"]).parent)  # adapters go by their folders' names
    voice = cast.stack(base)
    session = Session(voice, replace(default_decoding(voice), max_new_tokens=5))
    lines = ["This film is", "/adapter loud", "The music was", "/mix loud=0.7 low=-0.3", "/retry", "/adapter off"]
    lines += ["/compare loud off", "/compare low loud The end", "/undo", "/status"]
    out = io.StringIO()

    def read() -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    Terminal(session, read, out, cast).run()
    shown = out.getvalue()
    assert shown.count("model> ") == 3 and "(mix loud=0.7 low=-0.3 answers" in shown
    heads = [line.split() for line in shown.splitlines() if line.startswith(("loud  ", "low  "))]
    assert heads == [["loud", "off"], ["low", "loud"]]
    assert "(taken back: The music was)" in shown and [turn.content for turn in session.turns][0] == "This film is"
    assert "acting     the bare base" in shown and f"base       {base}" in shown
