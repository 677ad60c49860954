"""The blocks of the real reviews: who is in which, and that no text is in two."""

from __future__ import annotations

import itertools

import pytest

from peftlab.data import imdb
from peftlab.data.records import LabelledText
from peftlab.errors import UserError


@pytest.fixture(scope="module")
def blocks():
    """Every block by name."""
    return {name: imdb.load_block(name) for name in imdb.manifest()}


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("one<br /><br />two", "one\ntwo"),
        ("a <br>b<BR/> c</br>d< br / >e<br\n/>f", "a\nb\nc\nd\ne\nf"),
        ("  a\t\tb \u00a0c\r\n\r\n  d  ", "a b c\nd"),
        ("<br />a<br />", "a"),
        ("an <i>italic</i> <brr> 1 < 2", "an <i>italic</i> <brr> 1 < 2"),
    ],
)
def test_breaks_become_newlines_and_blanks_one(raw, cleaned):
    assert imdb.clean(raw) == cleaned
    assert imdb.clean(cleaned) == cleaned


def test_the_blocks_cover_the_reviews_in_order(blocks):
    shipped = imdb.manifest()
    for label in (0, 1):
        first, last = (int(i.split("/")[1]) for i in (shipped["train"]["ranges"][label][0],
                                                       shipped["test"]["ranges"][label][1]))
        assert last - first + 1 == 12_500
        kept = [int(r.id.split("/")[1]) for name in imdb.BLOCKS for r in blocks[name] if r.label == label]
        assert kept == sorted(kept)
        removed = {int(i.split("/")[1]) for name in imdb.BLOCKS for i in shipped[name]["removed"]}
        assert set(kept) == set(range(first, last + 1)) - removed
    for name, size in imdb.BLOCKS.items():
        assert len(blocks[name]) == shipped[name]["rows"] == 2 * size - len(shipped[name]["removed"])


def test_no_text_is_in_the_blocks_twice(blocks):
    texts = ["".join(filter(str.isalnum, row.text.casefold())) for block in blocks.values() for row in block]
    assert len(texts) == len(set(texts)) and all(texts)


def test_texts_are_clean(blocks):
    for row in itertools.chain(*blocks.values()):
        assert "<br" not in row.text and "  " not in row.text and row.text == row.text.strip()


def test_the_copy_nearer_train_goes():
    def row(name: str, text: str) -> LabelledText:
        return LabelledText(name, text, 0)

    blocks = {
        "train": [row("a", "One film."), row("b", "only here"), row("c", "two"), row("d", "Only, here!")],
        "prompts": [row("e", "one FILM")],
        "judge": [row("f", "Two?"), row("g", "three")],
        "test": [row("h", "three"), row("i", "four"), row("j", "onefilm")],
        imdb.ROTTEN: [row("k", "fo ur"), row("l", "five")],
    }
    assert imdb.duplicates(blocks) == {"a", "e", "c", "d", "g", "k"}


def test_changed_bytes_are_noticed(tmp_path, monkeypatch):
    block = tmp_path / "test.jsonl"
    block.write_text('{"id": "imdb/1", "text": "a", "label": 0}\n')
    monkeypatch.setattr(imdb, "derived", lambda name, build: tmp_path)
    with pytest.raises(UserError, match="differs from the shipped manifest"):
        imdb.load_block("test")
