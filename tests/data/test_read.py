"""Tests that every kind of file gives the same rows, and that each fault is reported with file and line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftjax.config.data import SourceConfig
from ftjax.data.faults import Faults
from ftjax.data.read import read_rows
from ftjax.data.reader import to_examples
from ftjax.data.text_files import read_csv
from ftjax.errors import UserError

ROWS = [{"prompt": "Hi, é", "completion": 'He said "no"\nand left'}, {"prompt": "2", "completion": "3"}]


def write(path: Path) -> Path:
    name = path.name.removesuffix(path.suffix) if path.suffix in PACKED else path.name
    table, plain = pa.Table.from_pylist(ROWS), path.with_name(name)
    if name.endswith((".jsonl", ".ndjson")):
        plain.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif name.endswith(".json"):
        plain.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif name.endswith((".csv", ".tsv")):
        sep = "," if name.endswith(".csv") else "\t"
        quoted = [[f'"{value}"'.replace('"no"', '""no""') for value in row.values()] for row in ROWS]
        plain.write_text("\r\n".join(sep.join(row) for row in [["prompt", "completion"], *quoted]), encoding="utf-8-sig")
    elif name.endswith(".parquet"):
        parquet.write_table(table, plain)
    elif name.endswith("stream.arrow"):
        with pa.OSFile(str(plain), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        with pa.OSFile(str(plain), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    if path.suffix in (".gz", ".bz2", ".xz"):
        pack = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[path.suffix]
        path.write_bytes(pack.compress(plain.read_bytes()))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(plain.read_bytes()[:20]) + zstandard.compress(plain.read_bytes()[20:]))
    if path != plain:
        plain.unlink()
    return path


KINDS = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "stream.arrow"]
PACKED = (".gz", ".bz2", ".xz", ".zst")


@pytest.mark.parametrize("name", [*KINDS, *(f"{kind}{packed}" for kind in KINDS for packed in PACKED)])
def test_every_kind_of_file(tmp_path, name):
    path = write(tmp_path / name)
    rows = list(read_rows(str(path)))
    assert [row.values for row in rows] == ROWS
    places = {"jsonl": (":1", ":2"), "ndjson": (":1", ":2"), "csv": (":2", ":4"), "tsv": (":2", ":4")}
    kind = next((part for part in name.split(".") if part in places), None)
    assert [row.where for row in rows] == [f"{path}{place}" for place in places.get(kind, ("[0]", "[1]"))]


def test_a_record_after_one_of_several_lines_has_its_own_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,e\n')
    assert [row.where for row in read_rows(str(path))] == [f"{path}:2", f"{path}:4"]


def test_folders_and_globs(tmp_path):
    write(tmp_path / "b.jsonl")
    write(tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "picture.png").write_bytes(b"...")
    assert [row.where.rpartition("/")[2] for row in read_rows(str(tmp_path))] == [
        "a.parquet[0]",
        "a.parquet[1]",
        "b.jsonl:1",
        "b.jsonl:2",
    ]
    assert len(list(read_rows(str(tmp_path / "*.jsonl")))) == 2
    with pytest.raises(UserError, match="matches no file"):
        list(read_rows(str(tmp_path / "*.csv")))
    with pytest.raises(UserError, match="unknown kind of file"):
        list(read_rows(str(tmp_path / "*")))


def test_of_a_folder_with_splits_the_one_that_is_meant(tmp_path):
    for name in ("train-00000.parquet", "validation-00000.parquet", "dataset_info.json"):
        write(tmp_path / name)
    for split in ("train", "validation"):
        rows = list(read_rows(SourceConfig(path=str(tmp_path), split=split)))
        assert {row.where.rpartition("/")[2] for row in rows} == {f"{split}-00000.parquet[0]", f"{split}-00000.parquet[1]"}
    with pytest.raises(UserError, match="none of test"):
        list(read_rows(SourceConfig(path=str(tmp_path), split="test")))


def test_what_datasets_saves(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert [row.values for row in read_rows(str(tmp_path / "saved"))] == ROWS


def test_a_hub_set_goes_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows(SourceConfig(path="org/name", subset="en", split="train[:2]", revision="abc")))
    assert [row.values for row in rows] == ROWS and rows[1].where == "org/name[1]"
    assert asked == [(("org/name", "en"), {"split": "train[:2]", "revision": "abc", "streaming": False})]


def test_a_hub_set_that_is_not_there(monkeypatch):
    import datasets

    def load(*args, **options):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"org/name: neither a file here .* nor a Hub data set .*: no network"):
        list(read_rows(SourceConfig(path="org/name", split="train")))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "a.jsonl: the data is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: the data is empty"),
        ("a.csv", b"prompt,completion\n", "a.csv: the data is empty"),
        ("a.json", b"[]", "a.json: the data is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a":\n', "a.jsonl:2: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl:2: expected a JSON object, found a list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl:2: not UTF-8 (byte 0xff)"),
        ("a.jsonl", b'{"a": "\x00"}\n', "a.jsonl:1: broken JSON"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: broken JSON"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl:1: broken JSON"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', "a.json:2: broken JSON"),
        ("a.json", b'[{"a": 1},\n{"a": 2}', "a.json:2: broken JSON"),
        ("a.json", b'[{"a": 1}]\nx', "a.json:2: broken JSON: something follows"),
        ("a.json", b'[{"a": 1}, 3]', "a.json[1]: expected a JSON object, found a number"),
        ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "several lists (train, test)"),
        ("a.json", b'{"a": \xff}', "a.json:1: not UTF-8"),
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv:3: 1 fields, but the header has 2: a, b"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', "a.csv:2: a quote opens here and does not close, so that the lines up to 3"),
        (
            "a.csv",
            b'a,b\n"1\n2","3 ""4""\n5,6\n7,8\n',
            "a.csv:3: a quote opens here and does not close, so that the lines up to 5",
        ),
        (
            "a.csv",
            b'a,b\n1,"2\n3,4\n5,"6"\n',
            "a.csv:2: broken CSV: ',' expected after '\"' (lines 2 to 4; the last quote opens in line 2)",
        ),
        ("a.csv", b'a,b\n1,"2', "a.csv:2: broken CSV: unexpected end of data"),
        ("a.csv", b"a,b\n1,\xff\n", "a.csv:2: not UTF-8 (byte 0xff)"),
        ("a.csv", b"a,a\n1,2\n", "a.csv:1: a column name occurs twice: 'a'"),
        ("a.parquet", b"PAR1 but not really", "a.parquet[0]: not a readable .parquet file"),
        ("a.arrow", b"ARROW1 but not really", "a.arrow[0]: not a readable .arrow file"),
        ("a.arrow", b"", "a.arrow[0]: not a readable .arrow file"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "a.jsonl.gz: cannot be read"),
        ("a.jsonl.zst", b"not zstd", "a.jsonl.zst: cannot be read"),
        ("a.jsonl.zst", zstandard.compress(b'{"a": 1}\n' * 1000)[:-9], "a.jsonl.zst: cannot be read"),
        ("a.jsonl.bz2", b"not bz2", "a.jsonl.bz2: cannot be read"),
        ("a.jsonl.xz", b"not xz", "a.jsonl.xz: cannot be read"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 1000)[:-20], "a.jsonl.xz: cannot be read"),
        ("a.xlsx", b"text", "a.xlsx: unknown kind of file"),
        ("a.txt", b" \n\n", "a.txt: the data is empty"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_rows(str(tmp_path / name)))
    assert message in str(caught.value) and str(tmp_path / name.partition("[")[0]) in str(caught.value)


def test_a_file_that_is_not_there_names_what_is(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"trian.jsonl: no such file.*holds train.jsonl"):
        list(read_rows(str(tmp_path / "trian.jsonl")))


def test_broken_rows_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\nnot json\n{"a": 2}\n"text"\n{"a": "\xff"}\n{"a": 3}')
    faults = Faults(skip=True)
    assert [row.values["a"] for row in read_rows(str(path), faults)] == [1, 2, 3]
    assert faults.count == 3 and [message.split(": ")[0] for message in faults.messages] == [f"{path}:{n}" for n in (2, 4, 5)]
    path.write_bytes(b"no\nno\n")
    with pytest.raises(UserError, match=r"all 2 rows were broken, the first: .*a.jsonl:1: broken JSON"):
        list(read_rows(str(path), Faults(skip=True)))


def test_a_list_that_breaks_off_is_an_error_also_where_rows_are_skipped(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"a": 1}, {"a" 2}, {"a": 3}]')
    with pytest.raises(UserError, match=r"a.json:1: broken JSON"):
        list(read_rows(str(tmp_path / "a.json"), Faults(skip=True)))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 100_000)
    rows = read_rows(str(path))
    next(rows)
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"a.jsonl(:\d+)?: (the file was changed while it was read|broken JSON)"):
        list(rows)


def test_a_line_of_megabytes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 5_000_000}) + "\n" + json.dumps({"text": "y"}))
    assert [len(row.values["text"]) for row in read_rows(str(path))] == [5_000_000, 1]


# Fuzzing: any bytes give rows or a message with a position, never another exception, and every lost row is counted.

junk = st.binary(max_size=60)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
columns = ["text", "prompt", "completion", "messages", "conversations", "instruction", "output", "input", "history", "label",
           "input_ids", "labels", "chosen", "rejected", "tools", "system", "references", "chat_template_kwargs"]  # fmt: skip
objects = st.dictionaries(st.sampled_from(columns), values, max_size=5)
lines = st.lists(objects.map(lambda row: json.dumps(row).encode()) | junk, max_size=6).map(b"\n".join)
cells = st.lists(st.lists(st.text(max_size=6), max_size=4).map(",".join), max_size=6).map(
    lambda rows: "\n".join(rows).encode("utf-8", "surrogatepass")
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=lines | junk | cells, kind=st.sampled_from(KINDS), skip=st.booleans())
def test_any_bytes(tmp_path, content, kind, skip):
    path = tmp_path / kind
    path.write_bytes(content)
    faults = Faults(skip)
    try:
        rows = list(read_rows(str(path), faults))
        examples = list(to_examples(rows, faults=faults))
    except UserError as error:
        assert str(path) in str(error)
        return
    assert len(examples) + faults.count >= len(rows)
    if kind.endswith("jsonl"):
        filled = sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in content.split(b"\n"))
        assert len(examples) + faults.count == filled


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(objects, min_size=1, max_size=4))
def test_any_values_are_examples_or_faults(rows):
    from ftjax.data.row import Row

    given = [Row(row, f"a.jsonl:{n}") for n, row in enumerate(rows, 1)]
    faults = Faults(skip=True)
    try:
        count = len(list(to_examples(given, faults=faults)))
    except UserError as error:
        assert str(error).startswith("a.jsonl:1: expected columns")
        return
    assert count + faults.count == len(rows)
    assert all(message.startswith("a.jsonl:") for message in faults.messages)


@pytest.mark.parametrize("skip", [False, True])
def test_a_quote_that_never_closes_takes_no_rows_along(tmp_path, skip):
    """An unclosed quote is an error even if broken rows are skipped: it would swallow the rows after it."""
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\na,b\n"c\nd","e\n' + "f,g\n" * 50)
    with pytest.raises(UserError, match=r"a\.csv:4: a quote opens here .* the lines up to 54 would be one field"):
        list(read_csv(path, path.open("rb"), None, ",", Faults(skip)))


@pytest.mark.parametrize(
    "said, noted", [('"c\nd,e\nf,g\nh"', True), ('"c\nof three, or\nof four, five, or\nsix"', False), ('"c\nd"', False)]
)
def test_a_field_that_holds_rows_is_noted(tmp_path, said, noted):
    path, faults = tmp_path / "a.csv", Faults()
    path.write_text(f"prompt,completion\na,b\nx,{said}\n")
    rows = list(read_csv(path, path.open("rb"), None, ",", faults))
    assert rows[1].values["completion"] == said.strip('"') and rows[1].where.endswith(":3")
    assert [note.partition(": ")[2][:38] for note in faults.notes] == ["a quoted field goes on up to line 6, a"] * noted
