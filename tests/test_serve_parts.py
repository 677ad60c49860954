"""What serving stands on: rows that join and leave a batch, and replies that grow piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from pathlib import Path

import pytest
import tiny
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import adapter

from peftlab.errors import Interrupted
from peftlab.models.adapters import LoraVariants
from peftlab.models.backbone import Backbone
from peftlab.models.mix import Mixer
from peftlab.models.per_row import PerRow
from peftlab.runs.signals import EndSignals
from peftlab.sampling import continuous
from peftlab.sampling.continuous import Batch, Chosen, Row, Slots, Together
from peftlab.sampling.sampler import Decoding, Sampler
from peftlab.web.app import create_app
from peftlab.web.reply import Reply
from peftlab.web.serve import Listener

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"gpt2": Slots, "llama": Slots, "unknown": Together}


def batch_of(kind: str, monkeypatch: pytest.MonkeyPatch) -> Batch:
    model, words = tiny.causal("llama" if kind == "unknown" else kind)
    if kind == "unknown":
        monkeypatch.setattr(continuous, "known_step", lambda model: None)
    batch = Batch(PerRow(Mixer(Backbone("tiny", model, words, ""))), Sampler(model, words), max_rows=5)
    assert isinstance(batch._cache, KINDS[kind])
    return batch


def run(batch: Batch, rows: list[Row], draw: random.Random) -> dict[Row, list[Chosen]]:
    """What each row says from its first token to its last; `draw` says when rows join."""
    said: dict[Row, list[Chosen]] = {row: [] for row in rows}
    waiting = list(rows)
    while waiting or batch.rows:
        joining = min(batch.room(waiting), draw.randint(0 if batch.rows else 1, 3))
        if joining:
            batch.join(waiting[:joining])
            del waiting[:joining]
        gone = set()
        for row, chosen in zip(batch.rows, batch.choose(), strict=True):
            said[row].append(chosen)
            if chosen.token == batch.sampler.eos_id or row.taken == row.decoding.max_new_tokens:
                gone.add(row)
        batch.leave(gone)
        batch.advance()
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_says_the_same_whoever_shares_its_batch(kind, monkeypatch):
    draw, batch = random.Random(1), batch_of(kind, monkeypatch)
    prompts = [draw.choices(range(3, 60), k=k % 9) for k in range(10)]  # one of them empty
    prompts[5] = prompts[7]
    decodings = [Decoding(draw.randint(1, 30), draw.choice([0, 0.8, 1.0]), draw.choice([0, 5]), 0.9) for _ in prompts]
    rows = [Row(ids, seed, how, top=3) for seed, (ids, how) in enumerate(zip(prompts, decodings, strict=True))]
    for row, chosen in run(batch, rows, draw).items():
        alone = batch.sampler.sample([row.ids], [row.seed], row.decoding)
        assert [c.token for c in chosen] == alone.completion_ids[0].tolist()
        logits = batch.sampler.model(alone.ids[:, -len(chosen) - max(1, len(row.ids)) :]).logits[0]
        wanted = logits[-len(chosen) - 1 : -1].log_softmax(-1)
        told = torch.tensor([c.logprob for c in chosen])
        assert torch.allclose(told, wanted.gather(-1, alone.completion_ids.T)[:, 0], atol=1e-4)
        assert [c.top[0][0] for c in chosen] == wanted.argmax(-1).tolist() and all(len(c.top) == 3 for c in chosen)


def test_adapters_act_on_their_own_rows_with_their_own_weights(tmp_path):
    base = str(tiny.causal_folder(tmp_path / "base"))
    one = adapter(base, tmp_path / "one", 1)
    two = adapter(base, tmp_path / "two", 2)
    over = adapter(base, tmp_path / "over", 3, (Path(one),))
    odd = adapter(base, tmp_path / "odd", 4, lora=LoraVariants(r=4, alpha=8, rslora=True))
    mixer = Mixer.open(base, "cpu")
    for name in (one, two, over, odd):
        mixer.load(name)
    shared = PerRow(mixer)
    assert shared.blend({odd: 1.0}) is None
    weights = [{one: 1.0}, {}, {over: 1.0}, {two: 0.5}, {one: 0.5, over: 0.25}, {one: 1.0}]
    ids = torch.randint(3, 300, (len(weights), 7))
    with torch.no_grad():
        with shared.rows([shared.blend(w) or () for w in weights]):
            together = mixer.model(ids).logits
        bare = mixer.model(ids).logits
        for row, mix in enumerate(weights):
            mixer.use(mix)  # the whole batch as one of them
            alone = mixer.model(ids).logits[row]
            assert torch.allclose(together[row], alone, atol=1e-4)
            assert mix == {} or not torch.allclose(together[row], bare[row], atol=1e-2)
    assert torch.equal(together[1], bare[1])


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stay_with_their_rows_whoever_joins_and_leaves(kind, tmp_path, monkeypatch):
    folder = tiny.llama_folder if kind == "llama" else tiny.causal_folder
    base = str(folder(tmp_path / "base"))
    mixer = Mixer.open(base, "cpu")
    names = [adapter(base, tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    for name in names:
        mixer.load(name)
    if kind == "unknown":
        monkeypatch.setattr(continuous, "known_step", lambda model: None)
    batch = Batch(PerRow(mixer), Sampler(mixer.model, mixer.tokenizer), max_rows=6)
    assert isinstance(batch._cache, KINDS[kind])
    acting = [{names[k % 2]: 1.0} if k % 3 else {} for k in range(6)]
    # Rows of one prompt and one blend are read once; lengths differ, so that rows leave one after the other.
    rows = [
        Row([5, 9, 7] if k < 4 else [8] * 5, 0, Decoding(3 + 2 * k, 0.0), batch.base.blend(mix) or (), top=0)
        for k, mix in enumerate([*acting[:2], acting[1], *acting[3:]])
    ]
    mixes = [*acting[:2], acting[1], *acting[3:]]
    said = run(batch, rows, random.Random(0))
    for row, mix in zip(rows, mixes, strict=True):
        with batch.base.rows([row.blend]):
            alone = batch.sampler.sample([row.ids], [0], row.decoding)
        told = torch.tensor([chosen.logprob for chosen in said[row]])
        assert [chosen.token for chosen in said[row]] == alone.completion_ids[0].tolist(), mix
        with batch.base.rows([row.blend]), torch.no_grad():
            logits = mixer.model(alone.ids[:, :-1]).logits[0, -len(told) :].log_softmax(-1)
        assert torch.allclose(told, logits.gather(-1, alone.completion_ids.T)[:, 0], atol=1e-4)


def test_memory_and_prompts_bound_who_joins(monkeypatch):
    batch = batch_of("gpt2", monkeypatch)
    rows = [Row([5] * 10, 0, Decoding(20)) for _ in range(9)]
    assert batch.room(rows) == 5
    monkeypatch.setattr(continuous, "CACHE_TOKENS", 95)
    assert batch.room(rows) == 3
    monkeypatch.setattr(continuous, "PREFILL_TOKENS", 25)
    assert batch.room(rows) == 2
    monkeypatch.setattr(continuous, "CACHE_TOKENS", 1)
    assert batch.room(rows) == 1, "a row that is alone always has room"
    batch.join(rows[:1])
    assert batch.room(rows[1:]) == 0


SPELLING = tiny.spelling_tokenizer()


def spelled(ids: list[int]) -> str:
    return SPELLING.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


TEXTS = st.text(st.sampled_from("ab é漢🎬\ufffd the film"), max_size=24)


@settings(max_examples=200)
@given(
    text=TEXTS,
    stops=st.lists(st.text(st.sampled_from("ab é🎬th"), min_size=1, max_size=4), max_size=3),
    lost=st.integers(0, 2),
    ended=st.booleans(),
)
def test_the_pieces_of_a_reply_join_to_its_text_before_the_first_stop(text, stops, lost, ended):
    ids = SPELLING(text, add_special_tokens=False)["input_ids"]
    ids = [*ids[: len(ids) - lost], *([1] if ended else [])]  # what is lost may be half a character
    if not ids:
        return
    reply, pieces = Reply(spelled, stops, 1, len(ids)), []
    for token in ids:
        pieces.append(reply.take(Chosen(token, -1.0)))
        if reply.finish:
            break
    whole = spelled(ids)
    cut = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
    given = [piece for piece in pieces if piece]
    assert "".join(piece.text for piece in given) == whole[:cut]
    assert "".join(token.text for piece in given for token in piece.tokens) == whole[:cut]
    assert [piece.finish for piece in given] == [None] * (len(given) - 1) + [reply.finish]
    assert reply.finish == ("stop" if ended or cut < len(whole) else "length")
    if not ended and cut == len(whole):
        assert sum(len(piece.tokens) for piece in given) == reply.count == len(ids)


def test_nothing_of_a_stop_is_shown_before_it_is_known_to_be_none():
    reply, shown = Reply(spelled, ["film was"], 1, 40), ""
    for token in SPELLING(" the film is, the film was", add_special_tokens=False)["input_ids"]:
        piece = reply.take(Chosen(token))
        shown += piece.text if piece else ""
        assert not any(shown.endswith("film was"[:n]) for n in range(1, 9))
    assert shown == " the film is, the " and reply.finish == "stop"


@pytest.mark.parametrize("moment", ["before it serves", "as its loop opens", "while it serves"])
def test_a_signal_ends_a_server_whenever_it_comes(moment, monkeypatch):
    def came(at: str) -> None:
        if moment == at:
            signal.raise_signal(signal.SIGTERM)

    class Loop(asyncio.SelectorEventLoop):
        def __init__(self):
            came("as its loop opens")
            super().__init__()
            self.call_later(0.2, came, "while it serves")

    monkeypatch.setattr(uvicorn.Config, "get_loop_factory", lambda config: Loop)
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.closing(Listener("127.0.0.1")) as listener, EndSignals() as signals:
        came("before it serves")
        with pytest.raises(Interrupted, match="stopped by SIGTERM"), signals.heard(listener.stop):
            listener.run(create_app(listener.token, listener.port, []))
    assert signal.getsignal(signal.SIGTERM) is before
