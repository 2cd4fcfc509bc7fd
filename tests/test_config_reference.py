"""Tests `ftjax config`: every key is there with its meaning, other tools' names lead to it, and each example trains."""

import json
import re

import pytest
from oracle import ONE, Case, make_hf
from tiny_tokenizer import save_tokenizer
from verbs import ftjax as command

import ftjax
from ftjax.config import Config
from ftjax.config.alias import ALIASES, EXPLAINED
from ftjax.config.examples import EXAMPLES, example
from ftjax.config.load import flatten_config, load_config
from ftjax.config.reference import REQUIRED, look_up, parts
from ftjax.config.yaml_text import Reader
from ftjax.errors import UserError

KEYS = [key for part in parts() for key in part.keys]


def test_every_key_has_a_meaning_and_every_section_too():
    assert [(key.name, key.variant) for key in KEYS if not key.meaning] == []
    assert [(part.name, part.variant) for part in parts() if not part.meaning and part.name != "output_dir"] == []


def test_every_setting_is_there_with_its_default():
    """The defaults of a configuration are those that are printed; a method's and an objective's are those of their own form."""
    for method, objective in (("lora", "sft"), ("full", "dpo"), ("ia3", "grpo")):
        tree = {"model": {"path": "m"}, "data": {"train": "d"}, "method": {"name": method}, "objective": {"name": objective}}
        flat = flatten_config(Config.model_validate(tree))
        known = {key.name: key.default for key in KEYS if key.variant in (None, method, objective)}
        for name in set(flat) - {"method.name", "objective.name", "model.path", "data.train"}:
            assert name in known, name
            changed = {"evaluate.task": "preference", "training.metric_for_best_model": "eval/reward"}  # by the objective
            if flat[name] != changed.get(name):
                want = flat[name].model_dump() if hasattr(flat[name], "model_dump") else flat[name]
                assert known[name] in ("its defaults",) or Reader("").read(known[name]) == _plain(want), name
    assert {key.name for key in KEYS if key.default == REQUIRED and "[]" not in key.name} == {"model.path", "data.train"}


def _plain(value):
    return json.loads(json.dumps(value))


def test_names_of_other_tools_lead_to_their_key():
    names = {key.name for key in KEYS}
    for name, alias in ALIASES.items():
        assert alias.target in names or alias.target in ("method.name", "objective.name"), name
        if alias.target in names:
            found, _ = look_up(name)
            assert alias.target in {key.name for part in found for key in part.keys}, name
    found, note = look_up("lora_rank")
    assert note == "lora_rank is read as method.r" and found[0].keys[0].aliases == ["lora_r", "lora_rank", "rank"]


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("training", {("training", None)}),
        ("lora", {("method", "lora")}),
        ("objective", {("objective", part.variant) for part in parts() if part.name == "objective"}),
        ("method.ia3", {("method", "ia3")}),
        ("optimizer.learning_rate", {("optimizer", None)}),
        ("dtype", {("model", None), ("evaluate", None)}),
        ("output_dir", {("output_dir", None)}),
    ],
)
def test_what_is_asked_is_found(asked, expected):
    assert {(part.name, part.variant) for part in look_up(asked)[0]} == expected


@pytest.mark.parametrize(
    "asked, said",
    [
        ("learning_rat", "did you mean learning_rate"),
        ("xyzzy", "sections: model, method"),
        ("deepspeed", EXPLAINED["deepspeed"]),
    ],
)
def test_what_is_not_there_is_said(asked, said):
    with pytest.raises(UserError, match=re.escape(said)):
        look_up(asked)


def test_the_command(capsys):
    assert command("config") == 0
    text = capsys.readouterr().out
    assert all(key.name in text and key.meaning.split("\n")[0] in text for key in KEYS)
    assert command("config", "training.max_steps") == 0
    text = capsys.readouterr().out
    assert "a whole number, at least 1, or null" in text and "max_train_steps" in text
    assert command("config", "batch_size") == 0 and "tools differ in what it counts" in capsys.readouterr().out
    assert command("config", "method.r", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["default"] == "8"
    assert command("config", "nothing_like_it") == 2 and command("config", "--example", "none") == 2
    assert "lora  " in capsys.readouterr().err


# ---- examples ----

ROWS = {
    "classification": [{"text": f"it is {n}", "label": ["odd", "even"][n % 2]} for n in range(8)],
    "dpo": [{"prompt": f"say {n}", "chosen": "yes", "rejected": "no"} for n in range(8)],
    "kto": [{"prompt": f"say {n}", "completion": "yes", "label": n % 2 == 0} for n in range(8)],
    "grpo": [{"prompt": f"say {n}", "answer": "yes"} for n in range(8)],
}
ROWS["reward"] = ROWS["dpo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    make_hf(Case("llama", "llama", {"max_position_embeddings": 128}), folder)
    save_tokenizer(folder, chat=True)
    return folder


@pytest.mark.parametrize(
    "name", [name if name in ("lora", "grpo", "kto") else pytest.param(name, marks=pytest.mark.sweep) for name in EXAMPLES]
)
def test_each_example_trains(name, model, tmp_path, monkeypatch, capsys):
    """The file that is printed trains; its comments are settings that it would take, too."""
    monkeypatch.chdir(tmp_path)
    assert command("config", "--example", name) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    rows = ROWS.get(name, [{"prompt": f"say {n}", "completion": "yes"} for n in range(8)])
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = load_config("run.yaml")
    assert (
        flatten_config(settings).items()
        >= {k: v for k, v in EXAMPLES[name].settings.items() if k != "objective.rewards"}.items()
    )
    whole = re.sub(r"^  #(\w+: )", r"  \1", example(name), flags=re.M)
    (tmp_path / "whole.yaml").write_text(whole)
    assert flatten_config(load_config("whole.yaml")) == flatten_config(settings)
    small = {"data__max_length": 64, "training__max_steps": 1, "training__global_batch_size": 8}
    if name == "grpo":
        small["objective__max_completion_length"] = 4
    run = ftjax.train("run.yaml", model__path=str(model), devices=ONE, quiet=True, **small)
    assert run.state == "finished at step 1"
