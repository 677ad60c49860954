"""A text told token by token joins to what all its tokens spell, in whole characters, at a cost that does not grow."""

from __future__ import annotations

import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from peftlab.models.catalog import resolve
from peftlab.sampling.spelling import WAITING, Spelling


def spaced() -> PreTrainedTokenizerFast:
    """As SentencePiece spells: ▁ begins a word, and is dropped where the text begins; a rare character is its bytes."""
    words = ["<unk>", "▁the", "▁film", "s", "▁", "é", *(f"<0x{byte:02X}>" for byte in "漢🎬".encode())]
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(dict.fromkeys(words))}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


TOKENIZERS = {
    "bytes": tiny.spelling_tokenizer(),
    "tiny-gpt2": PreTrainedTokenizerFast.from_pretrained(resolve("tiny-gpt2").path),
    "spaced": spaced(),
}
# A token each, or the bytes of a character: of a run of bytes that is none, that decoder takes back what was whole.
UNITS = [[1], [2], [3], [4], [5], [6, 7, 8], [9, 10, 11, 12]]
TEXTS = st.text(st.sampled_from("ab é漢🎬\ufffd the film"), max_size=24)


def check(name: str, ids: list[int]) -> None:
    def decode(tokens) -> str:
        return TOKENIZERS[name].decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    spelling = Spelling(decode)
    pieces = [spelling.add(token) for token in ids]
    assert "".join(pieces) + spelling.rest() == decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces)


@given(st.sampled_from(["bytes", "tiny-gpt2"]), st.lists(st.integers(0, 319), max_size=30))
@settings(max_examples=300)
def test_any_tokens_are_told_as_they_are_spelled(name, ids):
    """Also torn characters, bytes that are none, and special tokens."""
    check(name, [token % len(TOKENIZERS[name]) for token in ids])


@given(st.lists(st.sampled_from(UNITS), max_size=12))
def test_spaces_that_depend_on_the_word_before_are_kept(units):
    check("spaced", [token for unit in units for token in unit])


@given(st.sampled_from(["bytes", "tiny-gpt2"]), TEXTS, st.integers(0, 3))
def test_a_text_comes_in_whole_characters(name, text, lost):
    ids = TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]
    check(name, ids[: len(ids) - lost])


def test_what_is_decoded_for_a_token_does_not_grow():
    most = []
    tokenizer = TOKENIZERS["tiny-gpt2"]
    spelling = Spelling(lambda ids: (most.append(len(ids)), tokenizer.decode(ids))[1])
    for token in tokenizer("the film 漢 was " * 200)["input_ids"]:
        spelling.add(token)
    assert max(most) <= 8


def test_tokens_that_spell_nothing_are_let_go():
    longest = []
    spelling = Spelling(lambda ids: (longest.append(len(ids)), "a" * ids.count(0))[1])
    told = "".join(spelling.add(token) for token in [0] + [1] * 100 + [0]) + spelling.rest()
    assert told == "aa"
    assert max(longest) <= WAITING + 3
