"""Tests CSV of any delimiter and encoding, JSON of any shape, plain text, and values in tables that are not text."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from pydantic import ValidationError

from ftjax.config.data import DataConfig, SourceConfig
from ftjax.data.faults import Faults
from ftjax.data.read import read_rows
from ftjax.data.reader import to_examples
from ftjax.errors import UserError

ROWS = [{"prompt": "Hi", "completion": "Hello"}, {"prompt": "Bye", "completion": "Goodbye"}]


def values(path, content=None, **source):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row.values for row in read_rows(SourceConfig(path=str(path), split="train", **source))]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(tmp_path, name, sign):
    text = f'prompt{sign}completion\r\nHi, there{sign}Hello\r\n"a{sign}b"{sign}"c; d|e"\r\n'.replace(
        "Hi, there", '"Hi, there"' if sign == "," else "Hi, there"
    )
    assert values(tmp_path / name, text) == [
        {"prompt": "Hi, there", "completion": "Hello"},
        {"prompt": f"a{sign}b", "completion": "c; d|e"},
    ]


def test_a_delimiter_that_is_named(tmp_path):
    path = tmp_path / "a.csv"
    assert values(path, "prompt:a;completion\nHi:x;y\n", delimiter=":") == [{"prompt": "Hi", "a;completion": "x;y"}]
    assert values(path, "sep=;\r\nprompt;completion\r\nHi;Hello\r\n") == ROWS[:1]
    assert [row.where for row in read_rows(str(path))] == [f"{path}:3"]
    assert DataConfig(train="a", delimiter="tab").sources("train")[0].delimiter == "\t"
    for wrong in (";;", '"', "\n"):
        with pytest.raises(ValidationError, match="is not a delimiter"):
            DataConfig(train="a", delimiter=wrong)


def test_one_column_is_one_column_whatever_it_holds(tmp_path):
    assert values(tmp_path / "a.csv", "text\none; two\nthree | four\n") == [{"text": "one; two"}, {"text": "three | four"}]


def test_names_of_columns(tmp_path):
    assert values(tmp_path / "a.csv", ",Prompt , completion,\n0,Hi, Hello,\n") == [
        {"column 1": "0", "Prompt": "Hi", "completion": " Hello", "column 4": ""}
    ]


GERMAN = "prompt;completion\r\nGrüße;Schöne „Straße“ für 5 €\r\nWas?;Nichts, gar nichts…\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_excel_s_encodings_are_found(tmp_path, encoding, packed):
    import gzip

    path, content = tmp_path / f"a.csv{packed}", GERMAN.encode(encoding)
    path.write_bytes(gzip.compress(content) if packed else content)
    faults = Faults()
    rows = [row.values for row in read_rows(SourceConfig(path=str(path), split="train"), faults)]
    assert rows[0] == {"prompt": "Grüße", "completion": "Schöne „Straße“ für 5 €"} and len(rows) == 2
    assert [note.partition(": ")[2][:27] for note in faults.notes] == (
        ["not UTF-8, and read as cp12"] if encoding == "cp1252" else []
    )


CODE_PAGES = [("żółta gęś", "cp1250"), ("Привет", "cp1251"), ("日本語", "shift_jis"), ("中文", "gbk")]


@pytest.mark.parametrize("text, encoding", CODE_PAGES)
def test_another_code_page_is_not_taken_for_excel_s(tmp_path, text, encoding):
    path, content = tmp_path / "a.csv", f"prompt,completion\n{text},{text}\n".encode(encoding)
    with pytest.raises(UserError, match=r"a.csv:2: not UTF-8 .*data.encoding"):
        values(path, content)
    assert values(path, content, encoding=encoding) == [{"prompt": text, "completion": text}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_an_encoding_that_is_named_holds_for_every_text_file(tmp_path, name):
    text = {"a.csv": "text\nGrüße\u2028x\n", "a.txt": "Grüße\u2028x\n"}.get(name, '{"text": "Grüße\u2028x"}\n')
    for encoding in ("utf-16", "utf-16-le", "utf-8"):
        assert values(tmp_path / name, text.encode(encoding), encoding=encoding) == [{"text": "Grüße\u2028x"}]
    with pytest.raises(UserError, match=f"{name}: not (utf-16|ascii)"):
        values(tmp_path / name, "Grüße".encode(), encoding="ascii")


def test_an_encoding_that_nobody_knows():
    for wrong in ("utf-99", "base64"):
        with pytest.raises(ValidationError, match="is not an encoding that Python knows"):
            DataConfig(train="a", encoding=wrong)


CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "value, rows",
    [
        (ROWS, ROWS),
        ({"data": ROWS}, ROWS),
        ({"version": "1.0", "info": {"by": "me"}, "examples": ROWS}, ROWS),
        ({"prompt": ["Hi", "Bye"], "completion": ["Hello", "Goodbye"]}, ROWS),
        ({"prompt": {"0": "Hi", "1": "Bye"}, "completion": {"0": "Hello", "1": "Goodbye"}}, ROWS),
        ({"0": ROWS[0], "1": ROWS[1]}, ROWS),
        ({"first": ROWS[0], "second": ROWS[1]}, ROWS),
        ({"columns": ["prompt", "completion"], "index": [0, 1], "data": [list(row.values()) for row in ROWS]}, ROWS),
        (["one", "two"], [{"text": "one"}, {"text": "two"}]),
        ({"text": ["one", "two"]}, [{"text": "one"}, {"text": "two"}]),
        ({"messages": [CHAT, CHAT]}, [{"messages": CHAT}] * 2),
        ({"input_ids": [[1, 2], [3]]}, [{"input_ids": [1, 2]}, {"input_ids": [3]}]),
        # a single example
        ({"messages": CHAT}, [{"messages": CHAT}]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [{"prompt": CHAT[:1], "completion": CHAT[1:]}]),
        ({"input_ids": [1, 2], "labels": [1, 2]}, [{"input_ids": [1, 2], "labels": [1, 2]}]),
        ({**ROWS[0], "tools": [{"name": "f"}]}, [{**ROWS[0], "tools": [{"name": "f"}]}]),
        ({**ROWS[0], "documents": [{"title": "T"}]}, [{**ROWS[0], "documents": [{"title": "T"}]}]),
    ],
)
def test_shapes_of_json(tmp_path, value, rows):
    assert values(tmp_path / "a.json", json.dumps(value)) == rows


def test_a_list_under_the_name_of_lines(tmp_path):
    for indent in (None, 1):
        assert values(tmp_path / "a.jsonl", json.dumps(ROWS, indent=indent)) == ROWS


def test_a_row_of_a_list_is_named_by_its_number(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*ROWS, {"prompt": "Q", "completion": None}]))
    rows = list(read_rows(str(path)))
    assert [row.where for row in rows] == [f"{path}[{n}]" for n in range(3)]
    with pytest.raises(UserError, match=r"a.json\[2\]: 'completion' is empty"):
        list(to_examples(rows))


TEXT = "# One\r\nfirst line\n\n\nsecond line\nthird line\n"


@pytest.mark.parametrize(
    "name, by, texts, places",
    [
        ("a.txt", None, ["# One", "first line", "second line", "third line"], [":1", ":2", ":5", ":6"]),
        ("a.md", None, ["# One\nfirst line\n\n\nsecond line\nthird line"], [""]),
        ("a.txt", "document", ["# One\nfirst line\n\n\nsecond line\nthird line"], [""]),
        ("a.md", "paragraph", ["# One\nfirst line", "second line\nthird line"], [":1", ":5"]),
        ("a.md", "line", ["# One", "first line", "second line", "third line"], [":1", ":2", ":5", ":6"]),
    ],
)
def test_plain_text(tmp_path, name, by, texts, places):
    path = tmp_path / name
    path.write_bytes(TEXT.encode("utf-8-sig"))
    rows = list(read_rows(SourceConfig(path=str(path), split="train", sample_by=by)))
    assert [row.values for row in rows] == [{"text": text} for text in texts]
    assert [row.where for row in rows] == [f"{path}{place}" for place in places]


def test_only_the_first_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(9)) + "not json\n")
    source = DataConfig(train=[{"path": str(path), "limit": 2}, str(path)], limit=3).sources("train")
    assert [len(list(read_rows(one))) for one in source] == [2, 3]


def test_what_tables_hold_beside_text(tmp_path):
    columns = {
        "bytes": pa.array([b"Hi", "é".encode()]),
        "decimal": pa.array([decimal.Decimal("1.50")] * 2),
        "day": pa.array([datetime.date(2024, 1, 2)] * 2),
        "time": pa.array([datetime.datetime(2024, 1, 2, 3, 4)] * 2),
        "map": pa.array([[("a", "x")], []], pa.map_(pa.string(), pa.string())),
        "struct": pa.array([{"a": {"b": "x"}}, {"a": {"c": b"y"}}]),
        "list": pa.array([[{"a": 1}, {"b": 2}], []]),
        "ids": pa.array([[1, 2], [3]], pa.list_(pa.uint16())),
        "null": pa.array([None, "x"]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    shared = {"decimal": "1.50", "day": "2024-01-02", "time": "2024-01-02 03:04:00"}
    assert values(tmp_path / "a.parquet") == [
        {"bytes": "Hi", **shared, "map": {"a": "x"}, "struct": {"a": {"b": "x"}}, "list": [{"a": 1}, {"b": 2}], "ids": [1, 2],
         "null": None},
        {"bytes": "é", **shared, "map": {}, "struct": {"a": {"c": "y"}}, "list": [], "ids": [3], "null": "x"},
    ]  # fmt: skip


def test_bytes_that_are_no_text_are_refused_by_name(tmp_path):
    parquet.write_table(pa.table({"prompt": [b"\xff"], "completion": ["A"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet\[0\]: 'prompt' is bytes that are not UTF-8"):
        list(to_examples(read_rows(str(tmp_path / "a.parquet"))))


def test_nulls_that_a_table_pads_with_are_not_those_of_json(tmp_path):
    """Parquet pads each struct with the keys of all others; in JSONL the author wrote the null."""
    calls = [{"function": {"name": name, "arguments": {key: "x"}}} for name, key in (("f", "city"), ("g", "expr"))]
    rows = [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool_calls": [call]}],
         "tools": [{"name": "f", "parameters": {key: {"default": None, "enum": ["a", None]}}}]}
        for call, key in zip(calls, ("u", "v"), strict=True)
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "a.jsonl"):
        examples = list(to_examples(read_rows(str(tmp_path / name))))
        made = [dict(example.messages[1]["tool_calls"][0]["function"]["arguments"]) for example in examples]
        assert made == [{"city": "x"}, {"expr": "x"}]
    assert examples[0].tools == rows[0]["tools"]
