"""`peftlab data preview` shows the rows that the recipes train on: every token, what is learned, and what is cut."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import tiny
from commands import peftlab
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from peftlab.errors import UserError
from peftlab.recipes.preview import SAMPLE, cut_out, preview
from peftlab.recipes.preview_view import excerpt, plain, show

TEXTS = ["the film was good.", "a dull plot, but it was fun and great.", "it was not bad. " * 8]
TURNS = [("system", "a scene"), ("user", "good?"), ("assistant", "very good"), ("user", "fun?"), ("assistant", "no")]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> dict[str, str]:
    """The workshop, its weights destroyed (only tokenizers may load), and files of each kind of row."""
    folder = tmp_path_factory.mktemp("preview")
    shop = tiny.workshop(folder)
    for name in ("gpt2", "encoder", "t5"):
        (Path(shop[name]) / "model.safetensors").write_bytes(b"no weights")
    files = {
        "plain": [{"text": text} for text in TEXTS],
        "pairs": [{"prompt": f"{text} Why?", "completion": f" {text}"} for text in TEXTS],
        "classed": [{"text": text, "label": n % 2} for n, text in enumerate(TEXTS)],
        "summed": [{"document": text * 2, "summary": text} for text in TEXTS],
        "asked": [{"prompt": text} for text in TEXTS],
    }
    return shop | {name: tiny.write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()}


def pieces(found: dict) -> list[dict]:
    return [piece for row in found["rows"] for piece in row["pieces"]]


def read(piece: dict) -> str:
    return "".join(piece["tokens"])


def learned(piece: dict) -> str:
    return "".join(token for token, counts in zip(piece["tokens"], piece["learned"], strict=True) if counts)


def restored(piece: dict) -> str:
    """The row as it were without limits: what was cut put back at its place."""
    tokens = list(piece["tokens"])
    for cut in reversed(piece["cuts"]):
        tokens.insert(cut["after"], cut["text"])
    return "".join(tokens)


def test_of_a_pair_the_completion_and_its_end_are_learned(shop):
    found = preview(shop["pairs"], "sft", shop["gpt2"], 3, ["max_length=90"])
    for text, piece in zip(TEXTS[:2], pieces(found), strict=False):
        assert read(piece) == f"{text} Why? {text}<eos>" and learned(piece) == f" {text}<eos>"
        assert piece["cuts"] == []


def test_of_a_text_all_is_learned_but_the_first_token_of_a_block(shop):
    found = preview(shop["plain"], "sft", shop["gpt2"], 3, ["max_length=40"])
    for text, piece in zip(TEXTS, pieces(found), strict=True):
        assert read(piece) == f"{text}<eos>" and piece["cuts"] == []
        assert piece["blocks"] == -(-len(piece["tokens"]) // 40)
        assert [i for i, counts in enumerate(piece["learned"]) if not counts] == [*range(0, len(piece["tokens"]), 40)]
    assert pieces(found)[2]["blocks"] > 1


def test_of_a_chat_the_last_answer_is_learned(shop, tmp_path):
    folder = Path(tmp_path / "chatty")
    tiny.causal_folder(folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": role, "content": text} for role, text in TURNS]}]
    spec = tiny.write_rows(tmp_path / "chat.jsonl", rows)
    [piece] = pieces(preview(spec, "sft", str(folder), 1, ["max_length=96"]))
    assert learned(piece).strip() == "no<eos>" and "very good" in read(piece)


def test_a_classifier_reads_the_text_and_learns_its_label(shop):
    found = preview(shop["classed"], "classify", shop["encoder"], 3, ["max_length=60"])
    assert [row["label"] for row in found["rows"]] == ["negative", "positive", "negative"]
    assert found["labels"] == {"negative": 2, "positive": 1}
    assert [read(piece) for piece in pieces(found)][:2] == [f"<cls>{text}<sep>" for text in TEXTS[:2]]
    assert not any(map(learned, pieces(found)))


def test_a_summarizer_reads_the_document_and_learns_the_summary(shop):
    found = preview(shop["summed"], "summarize", shop["t5"], 1, ["max_length=90", "task_prefix=gist: "])
    document, summary = pieces(found)
    assert read(document).endswith(f"{TEXTS[0] * 2}<eos>") and read(document).startswith("gist:")
    assert learned(document) == "" and learned(summary) == read(summary) == f"{TEXTS[0]}<eos>"


def test_of_a_prompt_the_opening_is_read(shop):
    found = preview(shop["asked"], "prompts", shop["gpt2"], 3, ["prompt_tokens=[3,5]"])
    for text, piece in zip(TEXTS, pieces(found), strict=True):
        assert 3 <= len(piece["tokens"]) <= 5 and text.startswith(read(piece)) and restored(piece) == text


def test_a_prompt_may_be_read_whole(shop):
    found = preview(shop["asked"], "prompts", shop["gpt2"], 3, ["prompt_tokens=[0,0]"])
    for text, piece in zip(TEXTS, pieces(found), strict=True):
        assert read(piece) == text and piece["cuts"] == []


CUT = [
    ("pairs", "sft", "gpt2", ["max_length=30"]),  # the prompt loses its front
    ("pairs", "sft", "gpt2", ["max_length=8"]),  # and the answer its end
    ("plain", "sft", "gpt2", ["document_tokens=9", "max_length=40"]),
    ("classed", "classify", "encoder", ["max_length=16"]),
    ("summed", "summarize", "t5", ["max_length=16", "max_summary=8"]),
]


@pytest.mark.parametrize(("data", "kind", "model", "keys"), CUT, ids=[f"{kind}-{keys[0]}" for _, kind, _, keys in CUT])
def test_what_is_cut_is_shown_and_counted(data, kind, model, keys, shop):
    found = preview(shop[data], kind, shop[model], 3, keys)
    roomy = ["max_length=900", *(["max_summary=900"] if kind == "summarize" else [])]
    whole = preview(shop[data], kind, shop[model], 3, roomy)
    for piece, full in zip(pieces(found), pieces(whole), strict=True):
        assert restored(piece) == read(full) and full["cuts"] == []
        assert sum(cut["tokens"] for cut in piece["cuts"]) == piece["whole"] - len(piece["tokens"])
    table = {row["tokens"]: row for row in found["lengths"]}
    name = pieces(found)[0]["name"]
    firsts = [row["pieces"][0] for row in found["rows"]]
    assert table[name]["max"] == max(piece["whole"] for piece in firsts)
    assert table[f"{name}, seen"]["max"] == max(len(piece["tokens"]) for piece in firsts)
    assert table[name]["cut"] == f"{sum(bool(piece['cuts']) for piece in firsts) / 3:.1%}" != "0.0%"


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 12), st.integers(0, 12), st.booleans())
def test_what_is_cut_put_back_is_the_whole(whole, start, end, inside):
    """Whether one stretch was taken out, or one stretch was kept."""
    seen = whole[:start] + whole[max(start, end) :] if inside else whole[start:end]
    if not seen:
        return
    back = list(seen)
    for after, tokens in reversed(cut_out(whole, seen)):
        back[after:after] = tokens
    assert back == whole


def test_lengths_are_those_of_the_rows(tmp_path, shop):
    spec = tiny.write_rows(tmp_path / "a.jsonl", [{"text": "x" * n} for n in range(1, 101)])
    found = preview(spec, "sft", shop["gpt2"], 0, ["max_length=90"])
    row = {"tokens": "row", "min": 2, "median": 51, "p95": 96, "max": 101, "cut": "0.0%"}
    assert found["lengths"][0] == row and found["rows"] == []
    assert found["records"] == found["sample"] == 100 and found["training_rows"] < 100


def test_of_many_records_a_sample_is_measured(tmp_path, shop):
    spec = tiny.write_rows(tmp_path / "a.jsonl", [{"prompt": "good"}] * (SAMPLE + 7))
    found = preview(spec, "prompts", shop["gpt2"], 1, [])
    assert (found["records"], found["sample"], found["training_rows"]) == (SAMPLE + 7, SAMPLE, SAMPLE)
    assert "a sample of 1000 of 1007 records: 1000 rows to train on (one of each)" in shown(found)


def test_how_records_become_rows_is_told_in_words(tmp_path, shop):
    packed = preview(shop["plain"], "sft", shop["gpt2"], 0, ["max_length=40"])
    assert "rows to train on (texts are packed, one behind the other, into rows of 40 tokens)" in shown(packed)
    assert "3 rows to train on (one of each)" in shown(preview(shop["pairs"], "sft", shop["gpt2"], 0, []))
    both = Path(shop["plain"]).read_text() + Path(shop["pairs"]).read_text()
    (tmp_path / "both.jsonl").write_text(both)
    mixed = preview(str(tmp_path / "both.jsonl"), "sft", shop["gpt2"], 0, ["max_length=90"])
    assert mixed["how"].startswith("texts are packed") and mixed["how"].endswith("the others are a row each")
    views = preview(shop["classed"], "classify", shop["encoder"], 0, ["views=3", "max_length=60"])
    assert views["training_rows"] == 9 and "9 rows to train on (3 views of each)" in shown(views)


def test_the_users_columns_and_bad_rows_are_read_as_in_training(tmp_path, shop, capsys):
    path = tmp_path / "mine.csv"
    path.write_text("review,stars\nfine,pos\n,neg\ndull,neg\n")
    keys = ["columns.text=review", "columns.label=stars"]
    with pytest.raises(UserError, match=r"mine.csv:3: text: empty"):
        preview(str(path), "classify", shop["encoder"], 3, keys)
    found = preview(str(path), "classify", shop["encoder"], 3, [*keys, "on_bad_row=skip"])
    assert [(row["id"], row["label"]) for row in found["rows"]] == [("0", "positive"), ("2", "negative")]


def shown(found: dict, **options: object) -> str:
    out = io.StringIO()
    show(found, Console(file=out, width=40, **options))  # type: ignore[arg-type]
    return out.getvalue()


HOSTILE = "a [/red] [bold] \x9b31m \u202e b\nc\td "


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "color_system": "standard"}])
def test_nothing_that_a_text_says_reaches_the_terminal(options, tmp_path, shop):
    spec = tiny.write_rows(tmp_path / "a.jsonl", [{"id": HOSTILE, "prompt": HOSTILE, "completion": HOSTILE}])
    out = shown(preview(spec, "sft", shop["gpt2"], 1, []), **options)
    coloured = re.sub(r"\x1b\[[0-9;]*m", "", out)  # rich's own, which a pipe does not get
    assert (coloured != out) == bool(options)
    assert re.sub(r"[\n�]", "", coloured).isprintable()
    assert "[/red]" in coloured.replace("|", "") and "\\n" in coloured and "\\t" in coloured


def test_without_colour_brackets_stand_around_what_is_learned(shop):
    found = preview(shop["pairs"], "sft", shop["gpt2"], 1, ["max_length=90"])
    piped = shown(found)
    line = next(line for line in piped.splitlines() if line.startswith("the"))
    inside = re.findall(r"\[\[(.*?)\]\]", line)
    assert [text.replace("|", "") for text in inside] == [f" {TEXTS[0]}<eos>"]
    assert line.replace("|", "").replace("[[", "").replace("]]", "") == f"{TEXTS[0]} Why? {TEXTS[0]}<eos>"
    assert "[[" not in shown(found, force_terminal=True, color_system="standard")
    assert "[[" in shown(found, force_terminal=True, color_system="standard", no_color=True)


def test_the_command_prints_rows_and_table_and_json(shop):
    line = "data preview {pairs} --for sft --model {gpt2} max_length=20 --rows 2"
    outcome = peftlab(line, **shop)
    assert outcome.code == 0 and outcome.err == ""
    assert outcome.out.count("\nrow ") == 3  # two rows, and the table's
    assert re.search(r"^cut: \d+ tokens before the first: ", outcome.out, re.M)
    assert re.search(r"^tokens +min +median +p95 +max +cut$", outcome.out, re.M)
    assert json.loads(peftlab(f"{line} --json", **shop).out) == preview(
        shop["pairs"], "sft", shop["gpt2"], 2, ["max_length=20"]
    )


def test_a_config_stands_for_its_data_and_says_the_kind(shop, tmp_path):
    """As its recipe reads them, with its keys; overrides and --model come after it."""
    mine, policy = tmp_path / "mine.toml", tmp_path / "policy.toml"
    mine.write_text(f'recipe = "sft"\nmodel = "{shop["gpt2"]}"\ntrain_data = "{shop["pairs"]}"\nmax_length = 20\n')
    policy.write_text(f'recipe = "rloo"\ntrain_data = "{shop["asked"]}"\nprompt_tokens = [3, 3]\n')
    assert preview(str(mine), None, None, 2, []) == preview(shop["pairs"], "sft", shop["gpt2"], 2, ["max_length=20"])
    assert len(pieces(preview(str(mine), "sft", None, 1, ["max_length=9"]))[0]["tokens"]) == 9
    found = preview(str(policy), None, shop["gpt2"], 3, [])
    assert found["job"] == "rloo" and [len(piece["tokens"]) for piece in pieces(found)] == [3, 3, 3]
    done = peftlab("data preview {policy} --model {gpt2} --rows 1", **shop, policy=str(policy))
    assert done.code == 0 and "the loss is on what it samples" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{pairs}", ["give --for with one of sft, classify", "or a config in the place of"]),
        ("sft-tny", ["give --for with one of sft, classify", "did you mean sft-tiny?"]),
        ("reward-tiny", ["config reward-tiny", "the rows of reward", "`peftlab data preview DATA --for preferences`"]),
        ("pretrain-tiny-t5", ["the rows of pretrain", "`peftlab data preview DATA --for sft`"]),
        ("ppo-tiny --for sft", ["ppo-tiny: this config is for `peftlab ppo`, not for `peftlab sft`"]),
        ("nowhere.toml", ["config nowhere.toml: no such file"]),
        ("sft-tiny max_lenght=9", ["max_lenght", "did you mean max_length"]),
        ("{pairs} --for chat", ["--for chat", "sft, classify, summarize, preferences, prompts"]),
        ("{pairs} --for sft --rows -1", ["--rows -1"]),
        ("{pairs} --for sft max_lenght=9", ["max_lenght", "did you mean max_length"]),
        ("{pairs} --for sft columns.txet=a", ["txet", "did you mean text"]),
        ("{pairs} --for sft --model {encoder}", ["encoder", "causal"]),
        ("{pairs} --for summarize --model {t5}", ["pairs.jsonl:1", "document: missing", "--for summarize"]),
        ("nowhere.jsonl --for sft", ["nowhere.jsonl", "no such file"]),
    ],
)
def test_a_wrong_preview_is_one_message(line, words, shop):
    outcome = peftlab(f"data preview {line}", **shop)
    assert outcome.code == 2 and outcome.out == "" and outcome.err.startswith("peftlab: ")
    assert all(word in outcome.err for word in words), outcome.err


def test_lines_stay_lines():
    assert plain("a\nb\tc\r\x1b[2J") == "a\\nb\\tc\\r"
    long = excerpt("begin " + "x" * 500 + " end")
    assert long.startswith("begin") and long.endswith(" end") and len(long) < 100
