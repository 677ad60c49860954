"""Adapters that share a base: what switching, mixing and comparing do to the weights, and what the chat says of it."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import stacks
import tiny
import torch
from torch import Tensor

from peftlab.chat.router import Router
from peftlab.chat.session import Session, default_decoding
from peftlab.chat.terminal import Terminal
from peftlab.chat.voices import Cast, weights_of
from peftlab.data.records import Message
from peftlab.data.tokenize import PLAIN_CHAT
from peftlab.errors import UserError
from peftlab.models.adapter_files import load_stack
from peftlab.models.backbone import load_backbone
from peftlab.models.classifier import TextClassifier
from peftlab.models.mix import Mixer
from peftlab.sampling.sampler import Decoding

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("voices")


@pytest.fixture(scope="module")
def base(place) -> str:
    return str(tiny.causal_folder(place / "base"))


@pytest.fixture(scope="module")
def adapters(place, base) -> dict[str, str]:
    """Adapters of one base that say different things: plain ones, those over "plain", and variants."""
    return stacks.adapters(base, place)


@pytest.fixture
def mixer(base, adapters) -> Mixer:
    mixer = Mixer.open(base, "cpu")
    for name in ("plain", "other", "above", "rslora", "dora"):
        mixer.load(adapters[name])
    return mixer


@torch.no_grad()
def logits(model) -> Tensor:
    return model(input_ids=torch.arange(4, 60).view(2, -1)).logits


def weights(name: str) -> dict[str, Tensor]:
    """The base's weights with a stack merged into them, by the code that everything else loads it with."""
    backbone, _ = load_stack(name, device="cpu")
    return {n: p.detach() for n, p in backbone.model.named_parameters()}


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 2e-5 * other.abs().max())


@pytest.mark.parametrize("name", ["plain", "other", "above", "rslora", "dora"])
def test_an_adapter_that_acts_is_its_merged_stack(mixer, adapters, name):
    """Among five on one base, after others acted: the one in use, with what lies under it, and nothing else."""
    expected = logits(load_stack(adapters[name], device="cpu")[0].model)
    for other in ("rslora", "above", name):
        mixer.use({adapters[other]: 1.0})
    assert close(logits(mixer.model), expected)


def test_off_is_the_bare_base_bit_for_bit(mixer, base, adapters):
    expected = logits(load_backbone(base, device="cpu").model)
    mixer.use({adapters["plain"]: 1.0})
    assert not close(logits(mixer.model), expected)
    mixer.use({})
    assert torch.equal(logits(mixer.model), expected)


@pytest.mark.parametrize("shares", [(0.7, 0.3, 0.0), (0.5, 0.0, 0.5), (1.5, -0.5, 0.25)])
def test_a_mix_is_the_weighted_sum_of_the_stacks_deltas(mixer, base, adapters, shares):
    """Against weights: W + sum_k w_k (W_k - W), each W_k merged apart. "above" shares a component with "plain"."""
    names = [adapters[name] for name in ("plain", "other", "above")]
    bare, merged = weights(base), [weights(name) for name in names]
    model = load_backbone(base, device="cpu").model
    for key, parameter in model.named_parameters():
        deltas = [share * (stack[key] - bare[key]) for share, stack in zip(shares, merged, strict=True)]
        parameter.data += torch.stack(deltas).sum(0)
    mixer.mix(dict(zip(names, shares, strict=True)))
    mixer.use(dict(zip(names, shares, strict=True)))
    assert close(logits(mixer.model), logits(model))
    mixer.use({names[0]: 1.0})
    assert close(logits(mixer.model), logits(load_stack(names[0], device="cpu")[0].model)), "a mix leaves no trace"


@pytest.mark.parametrize(("name", "why"), [("rslora", "uses rsLoRA"), ("dora", "uses DoRA")])
def test_what_no_weight_scales_is_refused_by_name(mixer, adapters, name, why):
    with pytest.raises(UserError, match=f"{re.escape(adapters[name])} {why}"):
        mixer.mix({adapters["plain"]: 0.5, adapters[name]: 0.5})


def test_a_component_of_two_stacks_is_loaded_once(base, adapters):
    mixer = Mixer.open(adapters["above"], "cpu")
    assert mixer.load(adapters["above"]).parts[:1] == mixer.load(adapters["plain"]).parts
    assert len(mixer.model.transformer.h[0].attn.c_attn.lora_A) == 2


def test_a_stack_whose_delta_does_not_add_is_a_base_of_its_own(adapters):
    """DoRA over an adapter rescales what lies under it: it is merged, answers as ever, and nothing joins it."""
    mixer = Mixer.open(adapters["dora-above"], "cpu")
    assert torch.equal(logits(mixer.model), logits(load_stack(adapters["dora-above"], device="cpu")[0].model))
    with pytest.raises(UserError, match="merged and shares its base with none"):
        mixer.load(adapters["plain"])
    with pytest.raises(UserError, match="uses DoRA over another adapter; open it in a chat of its own"):
        Mixer.open(adapters["plain"], "cpu").load(adapters["dora-above"])


def test_another_base_of_that_name_is_refused(place, base, adapters):
    backbone = load_backbone(str(tiny.causal_folder(place / "elsewhere", seed=5)), device="cpu")
    with pytest.raises(UserError, match="stands on another base"):
        Mixer(replace(backbone, name=base)).load(adapters["plain"])


class Typed:
    """A chat in a folder of its own, with what these lines make it show."""

    def __init__(self, cast: Cast, name: str) -> None:
        voice = cast.stack(name)
        self.session = Session(voice, replace(default_decoding(voice), max_new_tokens=6, temperature=1.0))
        self.cast = cast

    def __call__(self, *lines: str, **options: str) -> str:
        def read() -> str:
            if not waiting:
                raise EOFError
            return waiting.pop(0)

        waiting, out = list(lines), io.StringIO()
        Terminal(self.session, read, out, self.cast, **options).run()
        return out.getvalue().split("\n", 2)[2]


@pytest.fixture(scope="module")
def cast() -> Cast:
    return Cast("cpu")


@pytest.fixture
def chat(cast, adapters, place, monkeypatch) -> Typed:
    monkeypatch.chdir(place)
    return Typed(cast, "plain")


@pytest.fixture(scope="module")
def personas(place, base, adapters) -> Path:
    """Three in ./personas of the chat's folder."""
    return stacks.personas(base, place)


def test_adapters_are_switched_and_mixed_while_one_talks(chat):
    lines = ["/adapter other", "/retry", "/mix plain=0.7 other = 0.3", "/retry", "/adapter off", "/adapter"]
    shown = chat("the film", *lines)
    assert "(other answers, which goes on with what you write)" in shown
    assert "(mix plain=0.7 other=0.3 answers" in shown
    assert shown.splitlines()[-1].startswith("acting: none; loaded on ") and "plain, other" in shown.splitlines()[-1]
    assert len(chat.session.turns) == 2 and chat.session.voice.weights == {}


def test_a_run_goes_by_its_name(chat, place, adapters):
    run = place / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "config.toml").touch()
    shutil.copytree(place / "other", run / "adapter")
    shown = chat("/adapter mine", "/mix mine=0.5 plain=0.5")
    assert "(runs/mine answers" in shown and "(mix runs/mine=0.5 plain=0.5 answers" in shown


def test_a_reply_is_that_of_the_voice_whatever_acted_between(chat, cast):
    """Two voices of one base in turn, as /compare has them: greedy replies are those of each alone."""
    chat.session.decoding = Decoding(max_new_tokens=6, temperature=0.0)
    turns = [Message("user", "the film was")]
    alone = {name: "".join(chat.session.aside(cast.stack(name), turns)) for name in ("plain", "other", "above")}
    assert len(set(alone.values())) > 1
    again = {name: "".join(chat.session.aside(cast.stack(name), turns)) for name in reversed(alone)}
    assert again == alone
    chat("/adapter other", "the film was")
    assert chat.session.turns[-1].content == alone["other"]


def test_two_stacks_are_compared_side_by_side_and_the_conversation_stays(chat):
    chat("the film")
    turns, voice = list(chat.session.turns), chat.session.voice
    shown = chat("/compare other off", "/compare other above a good plot")
    heads = [line.split() for line in shown.splitlines() if line.startswith("other")]
    assert heads == [["other", "off"], ["other", "above"]]
    assert max(map(len, shown.splitlines())) <= 80
    assert (chat.session.turns, chat.session.voice) == (turns, voice)
    chat.session.clear()
    assert "no turn yet" in chat("/compare other off") and "give two" in chat("/compare other")


def test_a_template_comes_and_goes_with_its_adapter(chat):
    assert "template answers, asked by its chat template" in chat("/adapter template")
    assert chat.session.voice.template == PLAIN_CHAT and chat.session.decoding.temperature == 0.2
    chat("/adapter other")
    assert chat.session.voice.template is None and chat.session.decoding.temperature == 0.7


@pytest.mark.parametrize(
    ("line", "said"),
    {
        "/adapter none": "none: not known here", "/mix plain": "give NAME=WEIGHT", "/mix": "give NAME=WEIGHT",
        "/mix plain=1 plain=2": "given twice", "/mix plain=nan": "give NAME=WEIGHT", "/mix dora=1": "dora uses DoRA",
        "/persona knid": "did you mean kind", "/score maybe": "on or off", "/persona large": "leaves no room",
    }.items(),
)
def test_a_wrong_name_is_one_line_and_changes_nothing(chat, personas, line, said):
    before = replace(chat.session)
    assert said in chat(line)
    assert (chat.session.voice, chat.session.decoding) == (before.voice, before.decoding)


def test_a_persona_brings_its_mix_its_system_text_and_its_decoding(chat, personas):
    shown = chat("/persona kind", "the film", "/persona", "/persona off", "/status")
    assert "kind> " in shown and "personas: asker, " in shown
    assert (chat.session.system, chat.session.voice.persona) == ("", None)
    chat("/persona kind")
    assert chat.session.voice.weights == {"plain": 0.5, "other": 0.5}
    assert (chat.session.system, chat.session.decoding.max_new_tokens) == ("be kind", 5)


def test_persona_off_gives_the_word_back_to_who_had_it(chat, personas):
    """Also where the persona stands on another base, and after several; after /persona auto as well."""
    chat("/adapter other", "/persona kind", "/persona asker", "/persona off")
    assert (chat.session.voice.label, chat.session.voice.weights) == ("other", {"other": 1.0})
    chat("/mix plain=0.7 other=0.3", "/set max_new_tokens=3", "/system be brief", "/persona kind", "/persona off")
    assert chat.session.voice.weights == {"plain": 0.7, "other": 0.3}
    assert (chat.session.decoding.max_new_tokens, chat.session.system) == (3, "be brief")
    chat("/persona kind", "/system be short", "/set max_new_tokens=4", "/persona off")  # what was set since, stays
    assert (chat.session.decoding.max_new_tokens, chat.session.system) == (4, "be short")
    chat("/persona kind", "/adapter plain", "/persona off")  # none answers: all stays as it is
    assert chat.session.voice.weights == {"plain": 1.0}
    chat.session.speak_as(chat.cast.persona("kind"))  # a chat that begins as a persona has nobody to go back to
    chat("/persona off")
    assert (chat.session.voice.persona, chat.session.voice.weights) == (None, {})


def test_an_empty_reply_is_told(chat, monkeypatch):
    monkeypatch.setattr(Session, "_stream", lambda self, prompt: iter([" "]))
    assert "(nothing: the model ended its reply at once; /retry asks again)" in chat("the film")
    monkeypatch.setattr(Session, "_stream", lambda self, prompt: iter([" fine"]))
    assert "(nothing" not in chat("the film")


def test_a_persona_with_a_prompt_is_asked_each_question_alone(chat, personas):
    chat("the plot", "/persona asker", "the film")
    asked = chat.session.sampler.tokenizer.decode(chat.session.fit())
    assert asked == "Is the film good?"
    assert "without a system text" in chat("/system be kind")


def test_the_score_of_a_reply_and_its_parts(chat, place):
    (place / "lab_rewards.py").write_text("def words(prompts, completions, records):\n    return [2.0]\n")
    reward = "lab_rewards:words + 0.5*rubric:length"
    shown = chat("/score on", "the film", "/compare plain other", "/score off", "good", reward=reward)
    assert f"(each reply is scored by {reward})" in shown
    totals = re.findall(r"reward \+([\d.]+) = words \+2\.00 \+ 0\.5 x length \+([\d.]+)", shown)
    assert totals and all(abs(float(total) - 2 - float(part) / 2) < 0.011 for total, part in totals)
    assert shown.splitlines()[-1].startswith("model> "), "off is off"
    assert "no score from now on: rubric part label" in chat("/score on", "the film", reward="rubric:label")


class Nose(TextClassifier):
    """A classifier that smells the word "bad"."""

    def probabilities(self, texts, batch_size=64):
        return torch.tensor([[0.9, 0.1] if "bad" in text else [0.2, 0.8] for text in texts])


def test_auto_picks_a_persona_for_each_turn_and_says_why(chat, personas, monkeypatch):
    nose = Nose("nose", torch.nn.Linear(1, 1), None, ["kind", "asker"], 64)
    monkeypatch.setattr("peftlab.chat.router.TextClassifier.load", lambda name, device: nose)
    shown = chat("/persona auto", "the bad film", "the film", "/status", "/persona kind", "good film")
    assert "(persona-router picks who answers each turn: kind, asker)" in shown
    assert "(kind, p 0.90: for 'bad')" in shown and "(asker, p 0.80: no single word decides)" in shown
    assert [line.partition("> ")[0] for line in shown.splitlines() if "> " in line] == ["kind", "asker", "kind"]
    assert "picked by  persona-router" in shown
    with pytest.raises(UserError, match="its classes nobody are no personas"):
        Router(replace(nose, labels=["kind", "nobody"]))


def test_weights_are_read_as_they_are_typed():
    assert weights_of("a=0.7 runs/b.c/x = -3e-1") == {"a": 0.7, "runs/b.c/x": -0.3}
