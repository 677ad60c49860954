"""Every bad row of a user's file is named by its line, with a reason; everything else is a record."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlab.data.check import OF_A_KIND, BadRows, check_file
from peftlab.data.records import (
    KINDS,
    LONGEST,
    Conversation,
    LabelledText,
    Message,
    PreferencePair,
    Prompt,
    PromptCompletion,
    SummaryPair,
    Text,
    parse_row,
)
from peftlab.errors import UserError

GOOD = [
    ("sft", {"text": "a"}, Text("0", "a")),
    ("sft", {"prompt": "a", "completion": "b", "id": 7}, PromptCompletion("7", "a", "b")),
    (
        "sft",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        Conversation("0", (Message("user", "a"), Message("assistant", "b"))),
    ),
    ("classify", {"text": "a", "label": 1, "id": "x"}, LabelledText("x", "a", 1)),
    ("classify", {"text": "a", "label": "Negative "}, LabelledText("0", "a", 0)),
    ("classify", {"text": "a", "label": 1.0, "id": None}, LabelledText("0", "a", 1)),
    ("summarize", {"document": "a", "summary": "b"}, SummaryPair("0", "a", "b")),
    ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c"}, PreferencePair("0", "a", "b", "c")),
    ("prompts", {"prompt": "a"}, Prompt("0", "a")),
    ("prompts", {"text": "a", "label": "pos", "id": ""}, Prompt("0", "a", 1)),
]


@pytest.mark.parametrize(("kind", "row", "record"), GOOD)
def test_rows_become_records(kind, row, record, tmp_path):
    assert parse_row(kind, row, 0) == record
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    assert check_file(path, kind).records == [record]


BAD = [
    ("classify", '{"text": "a", "label": 2}', "label: 2 is not one of 0, 1, neg, pos, negative, positive"),
    ("classify", '{"text": "a", "label": true}', "label: True is not one of"),
    ("classify", '{"text": "a", "label": 0.5}', "label: 0.5 is not one of"),
    ("classify", '{"text": "a", "label": NaN}', "label: nan is not one of"),
    ("classify", '{"text": "a", "label": null}', "label: None is not one of"),
    ("classify", '{"text": "a", "label": ["pos"]}', "label: ['pos'] is not one of"),
    ("classify", '{"text": "a", "label": 1e400}', "label: inf is not one of"),
    ("classify", '{"text": "a"}', "label: missing; the row has 'text'"),
    ("classify", '{"label": 1}', "text: missing; the row has 'label'"),
    ("classify", json.dumps(dict.fromkeys(map(str, range(999)))), "text: missing; the row has '0', '1', '2', '3'"),
    ("classify", "{}", "text: missing; the row has no fields"),
    ("classify", '{"te\\nxt": "a"}', "text: missing; the row has 'te\\nxt'"),
    ("classify", '{"text": "", "label": 1}', "text: empty"),
    ("classify", '{"text": " \\t\\u00a0\\n", "label": 1}', "text: empty"),
    ("classify", '{"text": null, "label": 1}', "text: null"),
    ("classify", '{"text": NaN, "label": 1}', "text: NaN"),
    ("classify", '{"text": 3, "label": 1}', "text: expected text, not 3"),
    ("classify", '{"text": "a\\u0000", "label": 1}', "text: holds the control character U+0000 at character 2"),
    ("classify", '{"text": "a\\u001b[2J", "label": 1}', "text: holds the control character U+001B at character 2"),
    ("classify", '{"text": "a\\ud800", "label": 1}', "text: holds half of a surrogate pair"),
    ("classify", '{"text": "a", "label": 1, "id": 1.5}', "id: expected text or an integer, not 1.5"),
    ("classify", '{"text": "a", "label": 1, "id": "\\udc00"}', "id: holds half of a surrogate pair"),
    ("sft", '{"txt": "a"}', "text (or prompt and completion, or messages): missing; the row has 'txt'"),
    ("sft", '{"prompt": "a"}', "completion: missing"),
    ("sft", '{"messages": []}', "messages: expected a list"),
    ("sft", '{"messages": "hi"}', "messages: expected a list"),
    ("sft", '{"messages": [{"role": "user", "content": "a"}]}', "messages: the last turn must be"),
    ("sft", '{"messages": [{"role": "bot", "content": "a"}]}', "messages[0].role: 'bot' is not one of"),
    ("sft", '{"messages": [{"role": ["user"]}]}', "messages[0].role: ['user'] is not one of"),
    ("sft", '{"messages": [{"role": "user", "content": " "}]}', "messages[0].content: empty"),
    ("sft", '{"messages": [{"role": "assistant", "content": "a"}]}', "messages[0].role: expected user, not assistant"),
    (
        "sft",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        "messages[1].role: expected assistant, not user",
    ),
    (
        "sft",
        '{"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "messages[1].role: expected user, not assistant",
    ),
    (
        "sft",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
        "messages[1].role: a system turn can only be the first",
    ),
    ("sft", '{"messages": ["hi"]}', "messages[0]: expected {role, content}, not 'hi'"),
    ("summarize", '{"document": "a", "summary": "\\n"}', "summary: empty"),
    ("preferences", '{"prompt": "a", "chosen": "b", "rejected": "b"}', "rejected: the same as chosen"),
    ("prompts", '{"promt": "a"}', "prompt: missing; the row has 'promt'"),
    ("sft", '["text"]', "expected an object with named fields, not ['text']"),
    ("sft", "null", "expected an object with named fields, not None"),
    ("sft", '{"text": "a"', "not valid JSON: "),
    ("sft", '{"text": "a', "not valid JSON: Unterminated string starting at column 10"),
    ("sft", "text", "not valid JSON: "),
    ("sft", '{"text": ' + "9" * 5000 + "}", "not valid JSON: a number too long"),
    ("sft", "[" * 200_000, "not valid JSON: "),
    ("sft", b'{"text": "\xff"}', "not UTF-8 at byte 11"),
    ("sft", '{"text": "a"} {"text": "b"}', "not valid JSON: Extra data at column 15"),
    ("sft", '{"text": "a", "text": "b"}', "the key 'text' is given twice in one object"),
    ("sft", '\ufeff{"text": "a"}', "begins with a byte order mark"),
    ("sft", '{"text": {"en": "a"}}', "text: expected text, not {'en': 'a'}"),
    ("sft", b'{"text": "' + b"a" * LONGEST + b'"}', "a line of 10,000,013 bytes; expected fewer than 10,000,000"),
]


@pytest.mark.parametrize(("kind", "raw", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_row_has_its_line_and_a_reason_of_one_line(kind, raw, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n  \n" + (raw if isinstance(raw, bytes) else raw.encode()) + b"\n")
    result = check_file(path, kind)
    assert result.rows == 1 and not result.records
    [(line, given_reason)] = result.bad
    assert line == 3 and given_reason.startswith(reason)
    assert given_reason.isprintable() and len(given_reason) < 300


def test_bom_crlf_and_blank_lines_are_accepted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": 1}\r\n{"text": "b\xe2\x80\xa8"}\r\n')
    result = check_file(path, "sft")
    assert [r.text for r in result.records] == ["a", "b\u2028"]
    assert result.rows == 3 and [line for line, _ in result.bad] == [3]
    # The number of a row counts bad rows too, so that it is the row's place in the file.
    assert [r.id for r in result.records] == ["0", "2"]


def test_an_id_given_twice_is_refused_the_second_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n{"text": "c"}\n{"text": "d"}\n')
    result = check_file(path, "sft")
    assert result.bad == [(2, "id: '1' is also in line 1")]
    assert [r.text for r in result.records] == ["a", "c", "d"]


def test_labels_name_the_classes(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a", "label": label} for label in ("Spam", "ham", 0, "1", "pos")]
    path.write_text("\n".join(map(json.dumps, rows)))
    result = check_file(path, "classify", labels=["ham", "spam"])
    assert [r.label for r in result.records] == [1, 0, 0, 1]
    assert result.bad == [(5, "label: 'pos' is not one of 0, 1, ham, spam")]
    many = [str(i) for i in range(20)]
    assert parse_row("classify", {"text": "a", "label": 12}, 0, many).label == 12
    assert parse_row("classify", {"text": "a", "label": "1"}, 0, ["1", "0"]).label == 0


def test_numbers_that_name_classes_are_names(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a", "label": label} for label in (1, "5", 5.0, 0, 6, "x")]
    path.write_text("\n".join(map(json.dumps, rows)))
    result = check_file(path, "classify", labels=["1", "2", "3", "4", "5"])
    assert [r.label for r in result.records] == [0, 4, 4]
    assert [line for line, _ in result.bad] == [4, 5, 6]
    many = [f"class {i}" for i in range(300)]
    with pytest.raises(ValueError, match="is not one of 0, 1, .*, [.]{3}$") as caught:
        parse_row("classify", {"text": "a", "label": "y"}, 0, many)
    assert len(str(caught.value)) < 200


def test_columns_are_mapped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("review,stars\nfine,pos\n")
    result = check_file(path, "classify", columns={"text": "review", "label": "stars"})
    assert result.records == [LabelledText("0", "fine", 1)]


@pytest.mark.parametrize(
    ("kind", "row", "columns", "record"),
    [
        # A mapping wins over a column that has the field's own name.
        ("classify", {"text": "a", "body": "b", "label": 1}, {"text": "body"}, LabelledText("0", "b", 1)),
        ("classify", {"text": "a", "label": 1}, {"text": "body"},
         "text: the row has no column 'body'; it has 'text', 'label'"),
        # Two fields may change places.
        ("preferences", {"prompt": "p", "chosen": "bad", "rejected": "good"},
         {"chosen": "rejected", "rejected": "chosen"}, PreferencePair("0", "p", "good", "bad")),
        # What is mapped says which shape a row has, whatever else lies in it.
        ("sft", {"prompt": "p", "completion": "c", "body": "b"}, {"text": "body"}, Text("0", "b")),
        ("sft", {"prompt": "p", "text": "t", "answer": "a"}, {"completion": "answer"}, PromptCompletion("0", "p", "a")),
        ("prompts", {"prompt": "p", "body": "b"}, {"text": "body"}, Prompt("0", "b")),
        ("sft", {"text": "t", "key": 7}, {"id": "key"}, Text("7", "t")),
    ],
)
def test_a_mapping_means_what_it_says(kind, row, columns, record, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    result = check_file(path, kind, columns=columns)
    assert [*result.records, *(reason for _, reason in result.bad)] == [record]


@pytest.mark.parametrize(
    ("kind", "row", "columns", "reason"),
    [
        ("sft", {"text": "t", "stars": 1}, {"text": "review"},
         "text: the row has no column 'review'; it has 'text', 'stars'"),
        ("sft", {"text": "t"}, {"completion": "answer"}, "completion: the row has no column 'answer'; it has 'text'"),
        ("classify", {"review": "r", "stars": 1}, {"text": "review"}, "label: missing; the row has 'review', 'stars'"),
        ("sft", {}, {"text": "review"}, "text: the row has no column 'review'; it has no fields"),
        ("sft", {"said": [{"role": "user", "text": "a"}]}, {"messages": "said"},
         "messages[0].content: missing; the row has 'role', 'text'"),
        # An optional field's column may be missing of a row.
        ("prompts", {"prompt": "p"}, {"label": "stars"}, None),
    ],
)
def test_a_mapped_column_that_is_missing_is_named_as_the_file_names_it(kind, row, columns, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    assert [why for _, why in check_file(path, kind, columns=columns).bad] == [reason] * (reason is not None)


@pytest.mark.parametrize(
    ("ids", "records", "reason"),
    [
        (["1", None, None], ["1", "2"], (2, "id: missing, and the row's number, 1, is also in line 1")),
        ([None, None, "0"], ["0", "1"], (3, "id: '0' is also in line 1, which has no id and goes by its number")),
        ([None, 2, 2], ["0", "2"], (3, "id: '2' is also in line 2")),
        (["7", None, "", None], ["7", "1", "2", "3"], None),
    ],
)
def test_a_number_that_stands_for_an_id_is_no_other_rows_id(ids, records, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": own, "text": "a"}) + "\n" for own in ids))
    result = check_file(path, "sft")
    assert [record.id for record in result.records] == records
    assert result.bad == ([reason] if reason else [])


def test_a_bad_row_takes_no_id(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "a", "id": 0}\n')
    assert [line for line, _ in check_file(path, "sft").bad] == [1]


@pytest.mark.parametrize(
    ("value", "label"),
    [(1.0, 1), (0.0, 0), (1, 1), ("Pos ", 1), ("0", 0), (0.5, None), (7, None), (float("nan"), None), (True, None),
     (None, None), ("five", None), ([1], None)],
)
def test_the_label_of_a_pair_is_read_as_a_classifiers_is(value, label):
    """1.0 is what pandas makes of 1 in a column with gaps. Of a pair, what is no class is no defect."""
    pair = {"prompt": "a", "completion": "b", "label": value}
    assert parse_row("sft", pair, 0).label == label
    if label is None:
        with pytest.raises(ValueError, match="label: "):
            parse_row("classify", {"text": "a", "label": value}, 0)
    else:
        assert parse_row("classify", {"text": "a", "label": value}, 0).label == label


def test_csv_rows_are_named_by_the_line_they_begin_on(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text , label\r\n'
        b'1,"two\r\nlines, ""quoted""",pos\r\n'  # lines 2 and 3
        b"2,short\r\n"  # 4
        b"\r\n"
        b"   \r\n"
        b"3,fine,maybe\r\n"  # 7
        b',"also\nfine",0\r\n'  # 8 and 9
        b'5,"x"y,1\r\n'  # 10
        b'6,"never closed,1\r\n'  # 11, found out at the quote in line 13
        b"7,plain,1\r\n"
        b'8,"with, comma",0\r\n'
        b'9,"never closed,1\r\n'  # 14
        b"10,the last,1\r\n"
    )
    result = check_file(path, "classify")
    assert result.records == [
        LabelledText("1", 'two\r\nlines, "quoted"', 1),
        LabelledText("3", "also\nfine", 0),
        LabelledText("7", "plain", 1),
        LabelledText("8", "with, comma", 0),
        LabelledText("10", "the last", 1),
    ]
    assert [line for line, _ in result.bad] == [4, 7, 10, 11, 14]
    assert result.rows == 10
    assert result.bad[0][1] == "2 cells, but the header has 3"
    assert result.bad[-1][1] == "not valid CSV: a quote is never closed"


def test_parquet_rows_are_named_by_their_number(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pq.write_table(pa.table({"messages": [turns, [], None]}), path)
    result = check_file(path, "sft")
    assert result.records == [Conversation("0", (Message("user", "a"), Message("assistant", "b")))]
    assert [line for line, _ in result.bad] == [2, 3]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("a.json", b"[]", "expected a file that ends in .jsonl, .csv, .parquet"),
        ("a", b"", "expected a file that ends in"),
        ("a.csv", b"text,na\xefve\n", "the header is not UTF-8"),
        ("a.csv", b"text,label,text\n", "the column 'text' appears twice"),
        ("a.csv", b'"text\n', "not valid CSV"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_message(name, data, message, tmp_path):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        check_file(tmp_path / name, "sft")
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_and_an_unknown_kind_are_messages(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        check_file(tmp_path / "a.jsonl", "sft")
    with pytest.raises(UserError, match="expected one of sft, classify"):
        check_file(tmp_path / "a.jsonl", "chat")
    with pytest.raises(UserError, match="--for ppo: ppo reads prompts"):
        check_file(tmp_path / "a.jsonl", "ppo")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_an_empty_file_has_no_rows(name, tmp_path):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf")
    result = check_file(tmp_path / name, "sft")
    assert (result.rows, result.records, result.bad) == (0, [], [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["id", "text", "label", "messages", "prompt", "completion", "chosen", "role"])


@given(st.sampled_from(KINDS), JSON | st.dictionaries(FIELDS, JSON))
def test_any_json_is_a_record_or_a_reason(kind, row):
    try:
        record = parse_row(kind, row, 5)
    except ValueError as error:
        assert str(error).isprintable()
    else:
        repr(record).encode("utf-8")


@given(st.sampled_from(["a.jsonl", "a.csv"]), st.binary() | st.text(st.sampled_from('ab",\n\r \\{}:é')).map(str.encode))
def test_any_bytes_are_rows_and_reasons(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(b"text,label\n" + data if name == "a.csv" else data)
    result = check_file(path, "classify")
    lines = [line for line, _ in result.bad]
    assert lines == sorted(set(lines)) and all(1 <= line <= data.count(b"\n") + data.count(b"\r") + 2 for line in lines)
    assert len(result.records) + len(lines) == result.rows
    assert all(reason.isprintable() for _, reason in result.bad)


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('"\n,'), min_size=1).filter(str.strip)


@given(st.lists(CELL, min_size=1), st.integers(0, 10**6))
def test_a_csv_reads_back_whatever_line_is_broken(tmp_path_factory, texts, at):
    """The rows that csv.writer wrote come back, all of them, with a line of too many cells anywhere between."""
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    at %= len(texts) + 1
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        for number, text in enumerate(texts):
            if number == at:
                file.write("one,cell,too many\n")
            rows.writerow([number, text])
    result = check_file(path, "sft")
    assert [(record.id, record.text) for record in result.records] == [(str(n), text) for n, text in enumerate(texts)]
    assert len(result.bad) == (at < len(texts))


def test_what_the_page_on_data_shows_is_what_is_printed(tmp_path, monkeypatch):
    """Each file of docs/data.md, named in the paragraph before its block, checked by each command there."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/data.md").read_text(encoding="utf-8")
    ran = 0
    for before, block in re.findall(r"([^\n]*(?:\n[^\n]+)*)\n\n```\n(.*?)```", page, re.S):
        if block.startswith("$ peftlab data check"):
            command, _, shown = block.removeprefix("$ peftlab ").partition("\n")
            assert commands.peftlab(command).out == shown
            ran += 1
        elif named := re.search(r"`([\w-]+\.(?:jsonl|csv))`", before):
            Path(named[1]).write_text(block)
    assert ran >= 5


REASON = st.sampled_from([
    "text: empty", "text: null", "label: missing; the row has 'text'", "label: 7 is not one of 0, 1", "id: 3 is bad",
])  # each a mistake of its own


@given(st.lists(REASON), st.booleans())
def test_a_pipe_gets_every_bad_row_and_a_terminal_some_of_every_mistake(reasons, fold):
    bad = BadRows(fold)
    lines = [line for number, reason in enumerate(reasons) for line in bad.lines(f"f:{number}", reason)]
    rest = bad.rest()
    assert bad.count == len(reasons)
    every = [f"f:{number}: {reason}" for number, reason in enumerate(reasons)]
    if not fold:
        assert (lines, rest) == (every, [])
        return
    assert lines == [line for at, line in enumerate(every) if reasons[:at].count(reasons[at]) < OF_A_KIND]
    told = re.findall(r"^[.]{3} and (\d+) more rows? like (f:\d+)$", "\n".join(rest), re.M)
    hidden = {first: int(more) for more, first in told}
    wanted = {f"f:{reasons.index(reason)}": reasons.count(reason) - OF_A_KIND for reason in reasons}
    assert hidden == {first: more for first, more in wanted.items() if more > 0}
    assert len(rest) == len(hidden)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("label: 'good' is not one of 0, 1", "label: \"it's\" is not one of 0, 1", True),
        ("label: 4 is not one of 0, 1", "label: 17 is not one of 0, 1", True),
        ("label: '" + "a" * 56 + "... is not one of 0, 1", "label: 'b' is not one of 0, 1", True),
        ("id: 'x' is also in line 1", "id: 'y' is also in line 907", True),
        ("not valid JSON: Expecting value at column 1", "not valid JSON: Expecting value at column 88", True),
        ("not valid JSON: Expecting value at column 1", "not valid JSON: Extra data at column 1", False),
        ("text: empty", "label: empty", False),
        ("text: empty", "text: null", False),
        ("messages[0].role: 'bot' is not one of", "messages[4].role: 'x' is not one of", True),
        ("messages[0].role: 'bot' is not one of", "messages[0].content: empty", False),
    ],
)
def test_mistakes_that_differ_in_a_value_only_are_alike(one, other, same):
    bad = BadRows(fold=True)
    for reason in (one, other) * OF_A_KIND:
        bad.lines("f:1", reason)
    assert len(bad.rest()) == (1 if same else 0)


def test_a_wrong_column_does_not_fill_a_terminal(tmp_path, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.chdir(tmp_path)
    Path("r.jsonl").write_text('{"txt": "a"}\n' * 500 + "no json\n" + '{"txt": "a"}\n' * 499)
    piped = commands.peftlab("data check r.jsonl --for classify")
    monkeypatch.setattr("commands.io.StringIO", Screen)
    seen = commands.peftlab("data check r.jsonl --for classify")
    assert piped.code == seen.code == 2
    *every, count = piped.out.splitlines()
    assert len(every) == 1000 and count == "1000 rows, 1000 bad"
    assert seen.out.splitlines() == [
        *every[:5], every[500], "... and 994 more rows like r.jsonl:1",
        "`peftlab data check r.jsonl --for classify | less` lists every bad row", count,
    ]


def test_checking_is_light():
    heavy = "torch", "transformers", "datasets", "numpy", "pyarrow"
    code = "import sys, peftlab.data.check, peftlab.data.sources; "
    code += f"sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
