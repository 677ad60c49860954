"""Every kind of defect in one file of 1,000 rows: exactly the planted lines are reported, each with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from commands import peftlab, program

from peftlab.data.records import LONGEST

ROWS = 1000
Defect = tuple[str | bytes, str]  # a line of the file, and how its reason begins

# What can be wrong with a line of JSON, whatever it is for. {good} is the inside of a good row.
JSON_DEFECTS: list[Defect] = [
    ("{{{good}", "not valid JSON: Expecting ',' delimiter"),
    ("{{{good}}} trailing", "not valid JSON: Extra data at column"),
    ("{{{good}}}{{{good}}}", "not valid JSON: Extra data at column"),
    ("plain words", "not valid JSON: Expecting value at column 1"),
    ("{{'text': 'single quotes'}}", "not valid JSON: Expecting property name"),
    ('{{"n": ' + "9" * 5000 + ", {good}}}", "not valid JSON: a number too long"),
    ("[" * 100_000, "not valid JSON: nested too deep"),
    ('["a", "list"]', "expected an object with named fields, not ['a', 'list']"),
    ("null", "expected an object with named fields, not None"),
    ('"text"', "expected an object with named fields, not 'text'"),
    ("\ufeff{{{good}}}", "begins with a byte order mark"),
    ('{{"n": 1, {good}, "n": 2}}', "the key 'n' is given twice in one object"),
    ('{{"id": 1.5, {good}}}', "id: expected text or an integer, not 1.5"),
    ('{{"id": true, {good}}}', "id: expected text or an integer, not True"),
    ('{{"id": ["a"], {good}}}', "id: expected text or an integer, not ['a']"),
    ('{{"id": "twin", {good}}}', "id: 'twin' is also in line 1"),
    ("{{}}", "{first}: missing; the row has no fields"),
    ('{{"txet": "a"}}', "{first}: missing; the row has 'txet'"),
    ('{{"n": "' + "a" * LONGEST + '", {good}}}', "a line of 10,000,"),
    (b'{"text": "caf\xe9"}', "not UTF-8 at byte 14"),
]
# What can be wrong with a text; the name of the field goes in front of the reason.
TEXT_DEFECTS = [
    ('""', "empty"),
    (r'" \n\t"', "empty"),
    (r'"\u00a0\u2003"', "empty"),
    ("null", "null"),
    ("NaN", "NaN"),
    ("Infinity", "expected text, not inf"),
    ("7", "expected text, not 7"),
    ("false", "expected text, not False"),
    ('{"en": "a"}', "expected text, not {'en': 'a'}"),
    ('["a"]', "expected text, not ['a']"),
    (r'"a\u0000b"', "holds the control character U+0000 at character 2"),
    (r'"\u001b[31mred"', "holds the control character U+001B at character 1"),
    (r'"bell \u0007"', "holds the control character U+0007 at character 6"),
    (r'"\ud83d"', "holds half of a surrogate pair"),
    (r'"a \udc00 b"', "holds half of a surrogate pair"),
]
# Lines of one kind only: values of `label`, of `messages`, and rows that contradict themselves.
LABELS = ["2", "-1", "true", "0.5", "null", "NaN", "Infinity", "[]", '""', '"maybe"', "1e99"]
USER, ANSWER = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
MESSAGES = [
    ("[]", "messages: expected a list of"),
    ('"hello"', "messages: expected a list of"),
    ('["hello"]', "messages[0]: expected {role, content}"),
    (f"[{USER}]", "messages: the last turn must be the assistant's"),
    (f"[{USER}, {ANSWER}, {USER}]", "messages: the last turn must be the assistant's"),
    (f"[{ANSWER}, {USER}]", "messages[0].role: expected user, not assistant"),
    (f"[{USER}, {USER}, {ANSWER}]", "messages[1].role: expected assistant, not user"),
    ('[{"content": "a"}]', "messages[0].role: None is not one of"),
    ('[{"role": "robot", "content": "a"}]', "messages[0].role: 'robot' is not one of"),
    (f'[{USER}, {{"role": "system", "content": "a"}}]', "messages[1].role: a system turn can only be the first"),
    (f'[{USER}, {{"role": "assistant"}}]', "messages[1].content: missing"),
    (f'[{USER}, {{"role": "assistant", "content": " "}}]', "messages[1].content: empty"),
]
GOOD = {
    "classify": '"text": "a", "label": 1',
    "sft": '"text": "a"',
    "summarize": '"document": "a", "summary": "b"',
    "preferences": '"prompt": "a", "chosen": "b", "rejected": "c"',
    "prompts": '"prompt": "a"',
}
OWN: dict[str, list[Defect]] = {
    "classify": [('{"text": "a"}', "label: missing; the row has 'text'")]
    + [(f'{{"text": "a", "label": {label}}}', "label: ") for label in LABELS],
    "sft": [(f'{{"messages": {turns}}}', reason) for turns, reason in MESSAGES]
    + [('{"prompt": "a"}', "completion: missing"), ('{"completion": "a"}', "prompt: missing")],
    "summarize": [('{"document": "a"}', "summary: missing")],
    "preferences": [
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "rejected: the same as chosen"),
        ('{"prompt": "a", "chosen": "b"}', "rejected: missing"),
    ],
    "prompts": [('{"prompt": "a", "label": 2}', "label: 2 is not one of")],
}
MISSING = {"sft": "text (or prompt and completion, or messages)"}  # how a row without any field is refused


def in_json(kind: str) -> list[Defect]:
    """Every defect of a JSONL file for `kind`."""
    good = GOOD[kind]
    fields = list(json.loads(f"{{{good}}}"))
    first = MISSING.get(kind, fields[0])
    found: list[Defect] = []
    for line, reason in JSON_DEFECTS:
        text = line if isinstance(line, bytes) else line.format(good=good)
        found.append((text, reason.format(first=first, role="role", content="content")))
    for field in fields:
        if field != "label":
            rest = [f'"{other}": 1' if other == "label" else f'"{other}": "z"' for other in fields if other != field]
            found += [("{" + ", ".join([f'"{field}": {value}', *rest]) + "}", f"{field}: {reason}")
                      for value, reason in TEXT_DEFECTS]
    return found + OWN[kind]


IN_CSV: list[Defect] = [
    ("few,cells", "2 cells, but the header has 3"),
    ("1,too,many,cells", "4 cells, but the header has 3"),
    ('q1,"never closed,1', "not valid CSV: "),
    ('q2,"closed" too early,1', "not valid CSV: "),
    (",,1", "text: empty"),
    (",   ,1", "text: empty"),
    (',"\n\n",1', "text: empty"),
    (",a,", "label: '' is not one of"),
    (",a,2", "label: '2' is not one of"),
    (",a,-1", "label: '-1' is not one of"),
    (",a,nan", "label: 'nan' is not one of"),
    (",a,True", "label: 'True' is not one of"),
    (",a,1.0", "label: '1.0' is not one of"),
    (",a,maybe", "label: 'maybe' is not one of"),
    ("twin,a,1", "id: 'twin' is also in line 2"),
    (",a\0b,1", "text: holds the control character U+0000 at character 2"),
    (",\x1b[31mred,1", "text: holds the control character U+001B at character 1"),
    (",bell \x07,1", "text: holds the control character U+0007 at character 6"),
    (",form\x0cfeed,1", "text: holds the control character U+000C at character 5"),
    ("\ufeff,joined,1", "begins with a byte order mark"),
    (b",caf\xe9,1", "not UTF-8: cell 2 holds the byte 0xe9"),
    (b"\xff,a,1", "not UTF-8: cell 1 holds the byte 0xff"),
    (b',"caf\xe9 of\ntwo lines",1', "not UTF-8: cell 2 holds the byte 0xe9"),
    (b"\xe2\x82,a,1", "not UTF-8: cell 1 holds the byte 0xe2"),
    (b",half a pair \xed\xa0\x80,1", "not UTF-8: cell 2 holds the byte 0xed"),
    (',"' + "a" * LONGEST + '",1', "not valid CSV: a row of 10,000,000 characters or more"),
]


def planted(
    path: Path, defects: Sequence[Defect], first: str, good: Callable[[int], str], head: Sequence[str] = ()
) -> dict[int, str]:
    """Write ROWS rows with the defects spread among good ones; the line of each defect and its reason.

    `first` is a good first row; a row may have several lines, and `head` stands before the rows.
    """
    step = (ROWS - 20) // len(defects)
    at = {10 + step * number: defect for number, defect in enumerate(defects)}
    lines, expected, line = [*head, first], {}, len(head) + 2
    for number in range(1, ROWS):
        text, reason = at.get(number, (good(number), None))
        if reason is not None:
            expected[line] = reason
        lines.append(text)
        line += (text if isinstance(text, bytes) else text.encode("utf-8")).count(b"\n") + 1
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode("utf-8") for x in lines) + b"\n")
    return expected


def assert_exactly(path: Path, kind: str, expected: Mapping[int, str]) -> None:
    """`peftlab data check` names each line of `expected` with its reason, in order, and no other; then counts."""
    outcome = peftlab(f"data check {path} --for {kind}")
    *reported, count = outcome.out.splitlines()
    assert outcome.code == 2 and outcome.err == ""
    assert count == f"{ROWS} rows, {len(expected)} bad"
    assert [int(line.removeprefix(f"{path}:").split(":")[0]) for line in reported] == list(expected)
    for line, (number, reason) in zip(reported, expected.items(), strict=True):
        assert line.startswith(f"{path}:{number}: {reason}"), line
        assert len(line) < 400 and line.isprintable()


@pytest.mark.parametrize("kind", GOOD)
def test_jsonl(kind, tmp_path):
    defects = in_json(kind)
    assert len(defects) >= 25
    first = f'{{"id": "twin", {GOOD[kind]}}}'
    expected = planted(tmp_path / "rows.jsonl", defects, first, lambda number: f'{{"id": {number}, {GOOD[kind]}}}')
    assert_exactly(tmp_path / "rows.jsonl", kind, expected)


def test_csv(tmp_path):
    assert len(IN_CSV) >= 25

    def good(number: int) -> str:
        return f'{number},"words, and ""quotes""",pos' if number % 3 else f'{number},"over\ntwo lines",0'

    expected = planted(tmp_path / "rows.csv", IN_CSV, "twin,first,1", good, ["id,text,label"])
    assert_exactly(tmp_path / "rows.csv", "classify", expected)


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    wrong = {
        5: ((None, b"a", "1"), None),
        20: ((None, None, "1"), "text: null"),
        40: ((None, b"", "1"), "text: empty"),
        60: ((None, b" \n", "1"), "text: empty"),
        80: ((None, b"a\0", "1"), "text: holds the control character U+0000"),
        100: ((None, b"\x1b[31m", "1"), "text: holds the control character U+001B"),
        120: ((None, b"caf\xe9", "1"), "not UTF-8 at byte 4 of a text"),
        140: ((None, b"a" * LONGEST, "1"), "text: 10,000,000 characters; expected fewer than 10,000,000"),
        160: ((None, b"a", None), "label: None is not one of"),
        180: ((None, b"a", "2"), "label: '2' is not one of"),
        200: ((None, b"a", "maybe"), "label: 'maybe' is not one of"),
        220: (("twin", b"a", "1"), "id: 'twin' is also in line 1"),
    }
    rows = [wrong[n][0] if n in wrong else ("twin" if n == 1 else None, b"a", "pos") for n in range(1, ROWS + 1)]
    ids, texts, labels = zip(*rows, strict=True)
    table = {"id": pa.array(ids, pa.string()), "label": pa.array(labels, pa.string())}
    table["text"] = pa.array(texts, pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    expected = {number: reason for number, (_, reason) in wrong.items() if reason}
    assert_exactly(tmp_path / "rows.parquet", "classify", expected)


def test_columns_and_labels_go_along(tmp_path):
    path = tmp_path / "stars.csv"
    path.write_text("review,stars\nfine,5\nso so,3\nbad,0\n")
    named = "--columns text=review --columns label=stars --labels 1,2,3,4,5"
    outcome = peftlab(f"data check {path} --for classify {named}")
    assert (outcome.code, outcome.out) == (2, f"{path}:4: label: '0' is not one of 1, 2, 3, 4, 5\n3 rows, 1 bad\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--columns text", ["--columns text", "FIELD=COLUMN"]),
        ("--columns txet=review", ["txet", "did you mean text"]),
        ("--columns score=review", ["score", "text, label"]),
        ("--columns text=a --columns prompt=b", ["--columns", "text and prompt", "map one"]),
        ("--columns messages=a --columns completion=b", ["completion and messages", "map one"]),
        ("--labels a", ["--labels a", "two or more"]),
        ("--labels a,,b", ["--labels a,,b"]),
        ("--labels a,A", ["different"]),
    ],
)
def test_wrong_options_are_one_message(options, words, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n')
    outcome = peftlab(f"data check {tmp_path / 'a.jsonl'} --for classify {options}")
    assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words), outcome.err


def test_the_program_itself_reports_and_exits_with_2(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    outcome = program(f"data check {tmp_path / 'a.jsonl'} --for sft")
    assert (outcome.code, outcome.out.splitlines()[-1]) == (2, "2 rows, 1 bad")
