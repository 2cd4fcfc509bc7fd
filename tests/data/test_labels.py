"""Tests label columns: one class, several labels or numbers, and what is refused with file and line."""

import json

import pytest
from data_sets import byte_level

from ftjax.config import Config
from ftjax.config.load import load_config, save_config
from ftjax.data.classes import with_labels
from ftjax.data.pipeline import load_splits
from ftjax.data.preview import show_examples
from ftjax.errors import UserError
from ftjax.objectives import encoding_of

MULTI = {"name": "classification", "problem_type": "multi_label_classification"}
NUMBER = {"name": "classification", "problem_type": "regression"}
ONE = {"name": "classification", "head": True}


def config_of(tmp_path, values, objective, column="label", **data) -> Config:
    """Return a configuration whose data has one row per value."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}", column: one}) + "\n" for n, one in enumerate(values)))
    return Config.model_validate({
        "model": {"path": "none"}, "method": {"name": "full"}, "objective": objective,
        "data": {"train": str(path), "max_length": 64, "drop_empty": True, **data},
    })  # fmt: skip


def labels_and_rows(config: Config) -> tuple[list[str], list[list[float]]]:
    config = with_labels(config)
    split, _ = load_splits(config.data, byte_level(), seed=0, encoding=encoding_of(config))
    return config.objective.labels, [document.labels.tolist() for (document,), _ in split.first(99)]


@pytest.mark.parametrize(
    ("values", "more", "labels", "rows"),
    [
        ([["b", "a"], [], ["b"]], {}, ["a", "b"], [[1, 1], [0, 0], [0, 1]]),
        ([["b", "a"], ["b"]], {"labels": ["b", "c", "a"]}, ["b", "c", "a"], [[1, 0, 1], [1, 0, 0]]),
        (["b, a", "", "b"], {"label_separator": ","}, ["a", "b"], [[1, 1], [0, 0], [0, 1]]),
        (['["b", "a"]', "[]"], {}, ["a", "b"], [[1, 1], [0, 0]]),  # a table's cells
        ([[2, 0], [1], []], {}, ["LABEL_0", "LABEL_1", "LABEL_2"], [[1, 0, 1], [0, 1, 0], [0, 0, 0]]),
        ([[1], [0]], {"labels": ["x", "y"]}, ["x", "y"], [[0, 1], [1, 0]]),
        ([[0, 1], [1], []], {"labels": ["x", "y"]}, ["x", "y"], [[1, 1], [0, 1], [0, 0]]),
        ([[0, 1], [1, 0]], {}, ["LABEL_0", "LABEL_1"], [[0, 1], [1, 0]]),  # two ids of two would mean both labels in every row
        ([[0, 1, 1], [0.0, 1.0, 0.0], [True, False, False]], {"labels": ["x", "y", "z"]}, ["x", "y", "z"],
         [[0, 1, 1], [0, 1, 0], [1, 0, 0]]),
        (["2 0", "1"], {"label_separator": " ", "label_format": "ids", "labels": ["x", "y", "z"]}, ["x", "y", "z"],
         [[1, 0, 1], [0, 1, 0]]),
        (["1 0", "1"], {"label_separator": " ", "label_format": "ids"}, ["LABEL_0", "LABEL_1"], [[1, 1], [0, 1]]),
        (["1,0", "1,1"], {"label_separator": ",", "label_format": "multi_hot"}, ["LABEL_0", "LABEL_1"], [[1, 0], [1, 1]]),
        ([[1], [0]], {"labels": ["x"]}, ["x"], [[1], [0]]),
    ],
)  # fmt: skip
def test_several_labels(values, more, labels, rows, tmp_path):
    assert labels_and_rows(config_of(tmp_path, values, {**MULTI, **more})) == (labels, rows)
    assert labels_and_rows(config_of(tmp_path, values, {**MULTI, **more}, "labels")) == (labels, rows)  # transformers' name


@pytest.mark.parametrize(
    ("values", "more", "labels", "rows"),
    [
        ([3, -0.5, "2.25", None], {}, ["LABEL_0"], [[3], [-0.5], [2.25]]),
        ([[1, 2.5], [3, 4]], {"labels": ["x", "y"]}, ["x", "y"], [[1, 2.5], [3, 4]]),
        (["1;2.5", "3;4"], {"label_separator": ";"}, ["LABEL_0", "LABEL_1"], [[1, 2.5], [3, 4]]),
    ],
)
def test_numbers(values, more, labels, rows, tmp_path):
    assert labels_and_rows(config_of(tmp_path, values, {**NUMBER, **more})) == (labels, rows)


def test_tables(tmp_path):
    """Cells of a table are texts; another column can be mapped, and several columns can be joined."""
    (tmp_path / "a.csv").write_text("text,score,tags\nx,0.5,joy|love\ny,-1e3,\nz,2,love\n")
    data = {"train": str(tmp_path / "a.csv"), "max_length": 64}
    base = {"model": {"path": "none"}, "method": {"name": "full"}}
    for objective, more, labels, rows in (
        (NUMBER, {"columns": {"label": "score"}}, ["LABEL_0"], [[0.5], [-1000], [2]]),
        ({**MULTI, "label_separator": "|"}, {"columns": {"label": "tags"}}, ["joy", "love"], [[1, 1], [0, 0], [0, 1]]),
        ({**NUMBER, "label_separator": " "}, {"template": "{text}", "completion_template": "{score} 1"}, ["LABEL_0", "LABEL_1"],
         [[0.5, 1], [-1000, 1], [2, 1]]),
    ):  # fmt: skip
        config = Config.model_validate({**base, "objective": objective, "data": {**data, **more}})
        assert labels_and_rows(config) == (labels, rows)


@pytest.mark.parametrize(
    ("values", "objective", "says"),
    [
        ([["a"], "b, a"], MULTI, r"a\.jsonl:2: the labels are the text 'b, a', expected a list; .* objective\.label_separator"),
        ([["a"], ["b", 1]], MULTI, r"a\.jsonl:2: names and numbers are mixed in \['b', 1\]"),
        ([["a"], [1]], MULTI, r"a\.jsonl:2: labels are numbers in .*a\.jsonl:2 and names in .*a\.jsonl:1"),
        ([["a"], ["b", "b"]], MULTI, r"a\.jsonl:2: the label 'b' occurs twice"),
        ([["a"], ["a", ""]], MULTI, r"a\.jsonl:2: a label is ''"),
        ([["a"], ["a", None]], MULTI, r"a\.jsonl:2: a label is None"),
        ([["a"], {"b": 1}], MULTI, r"a\.jsonl:2: the labels are \{'b': 1\}, expected a list"),
        ([["a"], ["c"]], {**MULTI, "labels": ["a", "b"]}, r"a\.jsonl:2: the label 'c' is not in objective\.labels: a, b"),
        ([[0], [2]], {**MULTI, "labels": ["a", "b"]}, r"a\.jsonl:2: the label 2 is not a number from 0 to 1"),
        ([[0, 2], [-1]], MULTI, r"a\.jsonl:2: the label -1 is not a number from 0 to 2"),
        ([[0.0, 1.0], [0.3, 1.0]], MULTI, r"a\.jsonl:2: the value 0\.3 of a label, expected 0 or 1"),
        ([[True, False], [True]], MULTI, r"a\.jsonl:2: expected 0 or 1 for each of 2 labels; found values: 1"),
        ([[0], [500]], MULTI, "501 labels by number; name them in objective.labels"),
        ([[], []], MULTI, "no row has a label"),
        ([1.5, "high"], NUMBER, r"a\.jsonl:2: 'high' is not a number that a regression can learn"),
        ([1.5, True], NUMBER, r"a\.jsonl:2: True is not a number"),
        ([1.5, "nan"], NUMBER, r"a\.jsonl:2: 'nan' is not a number"),
        ([1.5, 1e300], NUMBER, r"a\.jsonl:2: 1e\+300 is not a number"),
        ([[1, 2], [1]], NUMBER, r"a\.jsonl:2: expected as many numbers as in .*a\.jsonl:1, 2; found 1"),
        (
            [[1, 2], [1, 2]],
            {**NUMBER, "labels": ["x"]},
            r"a\.jsonl:1: expected 1 numbers, as objective\.labels says; found 2",
        ),
        # where several labels are not asked for
        (["a", ["a", "b"]], ONE, r"a\.jsonl:2: the label is \['a', 'b'\], expected one class; .*multi_label_classification"),
        (["a", ["a", "b"]], {**ONE, "head": False}, r"a\.jsonl:2: the label is .*multi_label_classification"),
        (["a", "b", "a|b"], ONE, r"a\.jsonl:3: the label 'a\|b' looks like several: a and b .* label_separator: '\|'"),
        (["a", ["a", "b"]], {"name": "sft"}, r"a\.jsonl:2: 'label' is a list of text, .*multi_label_classification"),
    ],
)
def test_refused(values, objective, says, tmp_path):
    with pytest.raises(UserError, match=says):
        config = with_labels(config_of(tmp_path, values, objective))
        load_splits(config.data, byte_level(), seed=0, encoding=encoding_of(config))


def test_broken_labels_can_be_skipped(tmp_path):
    config = with_labels(config_of(tmp_path, [["a"], 7, ["b"]], MULTI, on_error="skip"))
    split, _ = load_splits(config.data, byte_level(), seed=0, encoding=encoding_of(config))
    assert split.report.kept == 2 and split.report.dropped["broken (on_error: skip)"] == 1


def test_a_class_may_look_like_several_where_it_is_named(tmp_path):
    config = config_of(tmp_path, ["a", "b", "a|b"], {**ONE, "labels": ["a", "b", "a|b"]})
    assert with_labels(config).objective.labels == ["a", "b", "a|b"]


def test_labels_are_part_of_the_documents(tmp_path):
    """Other labels for the same texts count as other documents on resuming, and as other content."""
    found = []
    for values in ([["a"], ["b"]], [["b"], ["a"]]):
        config = with_labels(config_of(tmp_path, values, MULTI))
        split, _ = load_splits(config.data, byte_level(), seed=0, encoding=encoding_of(config))
        found.append((split.fingerprint()["digest"], tuple(split.documents.digest.tolist())))
    assert found[0][0] != found[1][0] and not set(found[0][1]) & set(found[1][1])


@pytest.mark.parametrize(
    ("values", "objective", "words"),
    [
        ([["b", "a"], []], MULTI, [" -> a, b", " -> (no label)"]), ([0.25, 3], NUMBER, [" -> 0.25", " -> 3"]),
        (["b", "a"], ONE, [" -> b", " -> a"]),
    ],
)  # fmt: skip
def test_preview_shows_the_label(values, objective, words, tmp_path):
    config = with_labels(config_of(tmp_path, values, objective))
    encoding = encoding_of(config)
    split, _ = load_splits(config.data, byte_level(), seed=0, encoding=encoding)
    shown = [item for (item,) in show_examples(split, byte_level(), 2, encoding)]
    assert [item.texts[-1] for item in shown] == words and shown[0].weights[-1] == 1


def test_what_was_found_is_kept(tmp_path):
    config = with_labels(config_of(tmp_path, [[1, 0], [0, 1]], MULTI))
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config and again.objective.label_format == "multi_hot" and again.objective.head
    assert again.evaluate.task == "classification"
    assert with_labels(config_of(tmp_path, [1.0, 2.0], NUMBER)).evaluate.task == "regression"


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({**MULTI, "head": False}, "needs a head"), ({**ONE, "label_separator": ","}, "multi_label_classification"),
        ({**NUMBER, "label_format": "ids"}, "goes with problem_type: multi_label_classification"),
        ({**MULTI, "labels": ["a", "a"]}, "each named once"), ({**ONE, "labels": ["a"]}, "two classes at least"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(objective, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        config_of(tmp_path, [["a"]], objective)
