"""Tests the table of several slices, made from saved plans and with measured runs."""

import csv
import json
from types import SimpleNamespace

import pytest

from ftjax.config.load import load_config
from ftjax.errors import UserError
from ftjax.plan import sweep as room
from ftjax.plan.sweep import find_knee, sweep


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Let child processes answer at once: 100 tokens/s per chip up to 16 chips, half beyond."""
    asked = []

    class Done:
        returncode, stderr = 0, ""

        def __init__(self, command):
            chips = int(command[command.index("--topology") + 1].rpartition("-")[2])
            speed = 100.0 if chips <= 16 else 50.0
            rows = int(next(part for part in command if "global_batch_size" in part).rpartition("=")[2])
            plan = dict.fromkeys(("hbm_bytes", "mfu", "tokens_per_day", "price", "cost_per_day", "cost_per_million_tokens"))
            plan |= {"topology": "", "chips": chips, "devices": chips, "slices": 1, "mesh": {}, "model": "", "method": "lora"}
            plan |= {"parameters": "", "attention": "", "remat": "", "rows": rows, "microbatches": 1, "max_length": 32}
            plan |= {"memory": {"total": 5e9}, "limit": 16e9, "fits": True, "flops": 1.0, "needed_flops": 1.0, "formula": ""}
            plan |= {"traffic": [], "seconds": {"ICI": 1.0}, "step_seconds": 1.0, "bound": "ICI", "advice": []}
            self.stdout = json.dumps(plan | {"tokens_per_second": chips * speed, "tokens_per_second_per_chip": speed})

    def answer(command, **_):
        asked.append(command)
        return Done(command)

    monkeypatch.setattr(room, "subprocess", SimpleNamespace(run=answer))
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    return asked


@pytest.fixture
def config(tmp_path):
    model = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(model))
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: {tmp_path}}}\ndata: {{train: none.jsonl, max_length: 32}}\n")
    return path


def go(config, out, names=("v5e-8", "v5e-16", "v5e-32"), **options):
    said = []
    options = {"weak": True, "price": None, "runs": [], **options}
    sweep(config, load_config(config, []), [], names, out=out, say=said.append, **options)
    return said, list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))


def test_table_plot_and_knee(config, planned, tmp_path):
    said, rows = go(config, tmp_path / "out")
    assert [row["rows"] for row in rows] == ["8", "16", "32"]
    assert said[-1].startswith("the knee is v5e-16")
    assert "<svg" in (tmp_path / "out" / "sweep.svg").read_text()
    go(config, tmp_path / "again")
    assert len(planned) == 3  # the second time, all came from the cache
    _, rows = go(config, tmp_path / "strong", weak=False)
    assert [row["rows"] for row in rows] == ["8", "8", "8"]
    assert len(planned) == 5  # eight chips with eight rows were planned before


def test_measured_runs_stand_beside(config, planned, tmp_path):
    run = tmp_path / "runs"
    run.mkdir()
    logs = [
        {"train/tokens_per_second": speed, "train/tokens_per_second_per_device": speed / 16} for speed in (3.0, 800, 1000, 900)
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*logs, {"eval/loss": 1.0}])))
    _, rows = go(config, tmp_path / "out", runs=[run])
    assert [row["measured_tokens_per_second"] for row in rows] == ["", "900", ""]
    assert float(rows[1]["measured_over_planned"]) == pytest.approx(900 / 1600)
    with pytest.raises(UserError, match="it ran on 16 devices; the slices planned here"):
        go(config, tmp_path / "out", names=("v5e-8",), runs=[run])
    with pytest.raises(UserError, match=r"expected a run folder with metrics\.jsonl"):
        go(config, tmp_path / "out", names=("v5e-8",), runs=[tmp_path])


def test_a_batch_that_does_not_scale(config, planned, tmp_path):
    with pytest.raises(UserError, match="or --strong"):
        go(config, tmp_path / "out", names=("v5e-16", "v5e-1"))


def test_no_knee():
    rows = [{"topology": f"v5e-{n}", "chips": n, "fits": True, "tokens_per_second_per_chip": 10.0} for n in (8, 16)]
    assert find_knee(rows).startswith("no knee up to v5e-16")
    assert find_knee(rows[:1]) is None
