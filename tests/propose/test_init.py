"""Tests of `ftjax init`: what it sees in data, what it proposes, and that other commands take the file that it writes."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from oracle import ONE
from verbs import ftjax as command

import ftjax
from ftjax.config.load import load_config
from ftjax.hub.vocabulary import hf_config_of
from ftjax.propose.command import init
from ftjax.propose.fit import fit
from ftjax.propose.goals import GOALS, goal_of, settings, with_goal
from ftjax.propose.lengths import Lengths
from ftjax.propose.machine import MODELS, SHARE, Machine, _free
from ftjax.propose.propose import TEMPLATE, stem
from ftjax.propose.rate import learning_rate
from ftjax.propose.seen import look

MACHINE = Machine(ONE, 8 * 10**9)
ROWS = {
    "chat": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"No {n}"}]} for n in range(24)],
    "classify": [{"text": f"text {n}", "label": ("good", "bad")[n % 2]} for n in range(24)],
    "summarise": [{"document": f"A long text {n}", "summary": f"text {n}"} for n in range(24)],
    "code": [{"prompt": f"def f{n}():", "completion": " pass", "test": "f()"} for n in range(24)],
    "qa": [{"question": f"1 + {n}?", "answer": f"It is\n#### {n + 1}"} for n in range(24)],
    "extract": [{"prompt": f"Tom is {n}", "completion": json.dumps({"age": n})} for n in range(24)],
    "preference": [{"prompt": f"Say {n}", "chosen": f"{n}", "rejected": "no"} for n in range(24)],
    "text": [{"text": f"Once upon a time {n}"} for n in range(24)],
}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "devices", lambda *_: ONE)
    return tmp_path


@pytest.mark.parametrize("goal", ROWS)
def test_the_data_shows_the_goal(goal, home):
    seen = look(write(home / "rows.jsonl", ROWS[goal]))
    assert goal_of(seen)[0] == goal and with_goal(seen, goal) is seen
    assert settings(seen, goal)["objective.name"][0] == {"classify": "classification", "preference": "dpo"}.get(goal, "sft")


@pytest.mark.parametrize("goal, wanted", [
    ("chat", {"model.chat_template": TEMPLATE}),
    ("preference", {"objective.name": "dpo", "optimizer.learning_rate": 1e-5, "training.num_train_epochs": 1.0}),
])  # fmt: skip
def test_the_file_previews(goal, wanted, home, untrained):
    found = init(write(home / "rows.jsonl", ROWS[goal]), Path("run.yaml"), model=str(untrained), machine=MACHINE)
    proposed = {one.key: one.value for one in found.settings}
    assert {key: proposed.get(key) for key in wanted} == wanted
    seen = ftjax.preview("run.yaml", examples=0)
    assert seen["train"]["kept"] + seen["train"]["held_out"] == 24
    assert seen["validation"]["kept"] >= 1


def test_nothing_is_held_out_of_rows_that_are_all_alike(home, untrained):
    found = init(write(home / "rows.jsonl", ROWS["chat"][:1] * 24), Path("run.yaml"), model=str(untrained), machine=MACHINE)
    assert "data.validation_split" not in {one.key for one in found.settings}
    assert any("1 different rows of 24 are too few" in one for one in found.warnings)
    assert ftjax.preview("run.yaml", examples=0)["train"]["kept"] == 24


def test_what_it_writes_trains(home, untrained):
    init(write(home / "rows.jsonl", ROWS["classify"]), Path("run.yaml"), model=str(untrained), machine=MACHINE)
    run = ftjax.train("run.yaml", training__max_steps=2, quiet=True)
    assert run.folder == home / "runs/rows" and np.isfinite(run.metrics["eval/loss"]).all()


def test_reasons_stand_before_their_settings(home, untrained):
    found = init(write(home / "rows.jsonl", ROWS["qa"]), Path("run.yaml"), model=str(untrained), machine=MACHINE)
    lines, at = Path("run.yaml").read_text().splitlines(), 0
    for one in found.settings:  # in the order of the file
        name = one.key.rpartition(".")[2]
        at = next(n for n, line in enumerate(lines) if n > at and line.split(":")[0].strip() == name)
        assert lines[at - 1].lstrip().startswith("# ") and one.why.split()[-1] in lines[at - 1]
    assert "LoRA Without Regret" in " ".join(lines)


def test_columns_of_other_names_and_odd_paths(home, untrained):
    path = home / "${a}: b, [c].csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["Question, asked", "The answer: given"], *([f"How many {n}?", f"{n}."] for n in range(30))]
        )
    init(str(path), Path("run.yaml"), model=str(untrained), machine=MACHINE)
    data = load_config("run.yaml").data
    assert data.train == str(path) and data.columns == {"prompt": "Question, asked", "completion": "The answer: given"}
    assert ftjax.preview("run.yaml", examples=0)["train"]["rows"] == 30


@pytest.mark.parametrize("rows, columns", [
    ([{"english": f"good day {n}", "german": f"Tag {n}"} for n in range(3)], {"prompt": "english", "completion": "german"}),
    ([{"q": f"{n} + 1?", "a": f"{n + 1}", "meta": {"level": n}} for n in range(3)], {"prompt": "q", "completion": "a"}),
    ([{"code": f"print({n})"} for n in range(3)], {"text": "code"}),
])  # fmt: skip
def test_columns_whose_names_say_nothing_are_taken_in_order(rows, columns, home, untrained, capsys):
    init(write(home / "rows.jsonl", rows), Path("run.yaml"), model=str(untrained), machine=MACHINE)
    assert load_config("run.yaml").data.columns == columns
    assert "by their order {" in capsys.readouterr().out and "a guess from their order" in Path("run.yaml").read_text()
    assert ftjax.preview("run.yaml", examples=0)["train"]["kept"] == 3


@pytest.mark.parametrize("given", ["prompt=german, completion=english", "{prompt: german, completion: english}"])
def test_columns_that_are_said(given, home, untrained, capsys):
    rows = [{"english": f"good day {n}", "german": f"guten Tag {n}"} for n in range(3)]
    init(write(home / "rows.jsonl", rows), Path("run.yaml"), model=str(untrained), machine=MACHINE, columns=given)
    assert load_config("run.yaml").data.columns == {"prompt": "german", "completion": "english"}
    assert "by their order" not in capsys.readouterr().out
    for wrong in ("german", "{prompt: [a]}", "{prompt"):
        with pytest.raises(ftjax.UserError, match=r"--columns .*german"):
            init("rows.jsonl", Path("other.yaml"), columns=wrong)


def test_files_of_other_splits_are_found(home, untrained):
    write(home / "qa-train.jsonl", ROWS["qa"])
    write(home / "qa-dev.jsonl", ROWS["qa"][:3])
    write(home / "qa-test.jsonl", ROWS["qa"][:3])
    init("qa-train.jsonl", Path("run.yaml"), model=str(untrained), machine=MACHINE)
    config = load_config("run.yaml")
    assert config.data.validation == "qa-dev.jsonl" and config.data.validation_split is None
    assert (config.evaluate.data, config.evaluate.task) == ("qa-test.jsonl", "numeric_answer")


@pytest.mark.parametrize("labels, kind", [
    ([["a"], ["a", "b"]], "multi_label_classification"),
    ([0.5, 2.25], "regression"),
    (["yes", "no"], "single_label_classification"),
])  # fmt: skip
def test_kinds_of_labels(labels, kind, home):
    seen = look(write(home / "rows.jsonl", [{"text": f"text {n}", "label": labels[n % 2]} for n in range(24)]))
    found = settings(seen, "classify")
    assert found.get("objective.problem_type", ("single_label_classification", ""))[0] == kind
    assert ("objective.head" in found) == (kind == "single_label_classification")


def test_a_few_answers_that_recur_are_classes_if_asked_for(home):
    data = write(home / "rows.jsonl", [{"prompt": f"Is {n} even?", "completion": ("yes", "no")[n % 2]} for n in range(24)])
    assert goal_of(look(data))[0] == "chat"
    seen = with_goal(look(data), "classify")
    assert seen.format == "text_label" and seen.columns == {"text": "prompt", "label": "completion"}


@pytest.mark.parametrize("goal, asked", [("text", "classify"), ("chat", "reward"), ("preference", "qa")])
def test_a_goal_that_does_not_fit_the_data(goal, asked, home):
    seen = look(write(home / "rows.jsonl", ROWS[goal]))
    with pytest.raises(ftjax.UserError, match=f"--goal {asked} takes data of the formats .*{GOALS[asked].formats[0]}.*{goal}"):
        with_goal(seen, asked)


def test_a_file_is_replaced_only_if_told(home, untrained, capsys):
    data = write(home / "rows.jsonl", ROWS["qa"])
    Path("run.yaml").write_text("mine")
    assert command("init", data, "--model", str(untrained), "--yes") == 2
    assert "run.yaml exists; name another file with --out, or replace it with --force" in capsys.readouterr().err
    assert Path("run.yaml").read_text() == "mine"
    with pytest.raises(ftjax.UserError, match="exists"):
        init(data, Path("run.yaml"), model=str(untrained), machine=MACHINE, ask=lambda question, default: default)
    assert command("init", data, "--model", str(untrained), "--yes", "--force") == 0
    assert load_config("run.yaml").data.train == data


def test_a_person_is_asked(home, untrained):
    asked = []

    def ask(question, default):
        asked.append((question.split()[0], default))
        return {"goal": "chat", "model:": str(untrained), "folder": "runs/mine"}[question.split()[0]]

    found = init(write(home / "rows.jsonl", ROWS["qa"]), Path("run.yaml"), ask=ask, machine=MACHINE)
    assert asked == [("goal", "qa"), ("model:", MODELS[-1][0]), ("folder", "runs/rows")]
    config = load_config("run.yaml")
    assert (found.goal, config.model.path, config.output_dir) == ("chat", str(untrained), "runs/mine")


def test_data_that_is_not_understood(home):
    with pytest.raises(ftjax.UserError, match="expected columns"):
        look(write(home / "rows.jsonl", [{"a": n, "b": 2 * n} for n in range(9)]))


def test_little_memory_takes_microbatches_then_fewer_bits(home, untrained):
    data = write(home / "rows.jsonl", ROWS["qa"] * 40)
    found = init(data, Path("run.yaml"), model=str(untrained), machine=Machine(ONE, 10**5))
    assert not found.fit.fits and "too large for" in found.warnings[0]
    config = load_config("run.yaml", ["model.remat=none", "model.quantization=null"])  # whatever the memory is
    hf_config = hf_config_of(config)
    plenty = fit(config, hf_config, MACHINE)
    assert (plenty.microbatches, plenty.quantization, plenty.fits) == (1, None, True)
    need = sum(plenty.memory.values())
    less = fit(config, hf_config, Machine(ONE, int(need)))  # a part of which is for what the plan does not count
    assert less.microbatches > 1 and less.fits and sum(less.memory.values()) < SHARE * need


def test_a_row_holds_the_longest_document_or_nearly_all():
    assert Lengths(np.array([20, 181]), 1.0, 2).row(None) == (256, 0)
    assert Lengths(np.array([3]), 1.0, 1).row(None) == (128, 0)
    assert Lengths(np.array([100] * 999 + [5000]), 1.0, 1000).row(None) == (128, 1)
    assert Lengths(np.array([100] * 90 + [900] * 10), 1.0, 100).row(512) == (512, 10)


def test_rates_follow_their_rules():
    # LoRA Without Regret: 5e-5 * 10 * (2000 / 4096) ** 0.781 for Llama-3.1-8B
    assert learning_rate("sft", "lora", "llama", 4096)[0] == pytest.approx(2.9e-4)
    assert learning_rate("sft", "full", "llama", 4096)[0] == pytest.approx(2.9e-5)
    assert learning_rate("sft", "lora", "qwen3", 4096)[0] == pytest.approx(4.7e-4)
    assert learning_rate("sft", "lora", "gemma3_text", 4096)[0] == learning_rate("sft", "lora", "qwen3", 4096)[0]
    assert learning_rate("sft", "lora", "llama", 64)[0] == 1e-3  # not beyond what adapters use
    assert (learning_rate("dpo", "lora", "llama", 64)[0], learning_rate("reward", "lora", "llama", 64)[0]) == (1e-5, 1e-4)


def test_a_model_is_chosen_that_fits_the_devices():
    class Gpu:
        platform, device_kind = "gpu", "H100"

    assert MACHINE.model()[0] == MODELS[-1][0]
    assert Machine([Gpu()], 80 * 10**9).model()[0] == MODELS[0][0]
    assert Machine([Gpu()], 24 * 10**9).model()[0] == MODELS[1][0]
    assert Machine([Gpu()], 10**9).model()[0] == MODELS[-1][0]


def test_memory_is_what_the_control_group_leaves(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemAvailable:   600 kB\n")
    assert _free(tmp_path / "meminfo", tmp_path) == 600 * 1024
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.current").write_text("100000\n")
    assert _free(tmp_path / "meminfo", tmp_path) == 200_000
    (tmp_path / "memory.max").write_text("max\n")
    assert _free(tmp_path / "meminfo", tmp_path) == 600 * 1024


def test_names_of_runs():
    assert (stem("data/reviews.csv"), stem("sentiment/train.jsonl.gz"), stem("org/set")) == ("reviews", "sentiment", "set")
