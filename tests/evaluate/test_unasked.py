"""Tests that run folders, which may be somebody else's, neither run Python here nor read the environment."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from oracle import ONE
from verbs import check, evaluate, evaluate_harness, generate

from ftjax.config.load import config_of, load_config
from ftjax.errors import UserError
from ftjax.evaluate.observe import make_observer
from ftjax.evaluate.target import find_target
from ftjax.hub.export import export
from ftjax.report.command import report


@pytest.fixture
def theirs(changed, tmp_path):
    """Return a run whose configuration names code in each way; each of the files would create `ran`."""
    ran, folder = tmp_path / "ran", tmp_path / "code"
    folder.mkdir()
    code = f"open({str(ran)!r}, 'w').close()\n"
    (folder / "metric.py").write_text(f"{code}def length(prediction): return len(prediction)")
    (folder / "utils.py").write_text(f"{code}def one(doc): return 'a'")
    (folder / "task.yaml").write_text("task: theirs\ndataset_path: json\ndoc_to_text: !function utils.one\n")
    lm_eval = {"tasks": [str(folder / "task.yaml")], "include_path": str(folder)}
    run = changed(
        evaluate={"task": str(folder / "metric.py"), "lm_eval": lm_eval, "training_rows": 2, "max_new_tokens": 2},
        check={"lm_eval_tasks": [str(folder / "task.yaml")]},
    )
    return run, folder, ran


def test_a_metric(theirs, tmp_path):
    run, folder, ran = theirs
    moved = tmp_path / "moved"  # a folder without the other files that a run writes
    shutil.copytree(run / "final", moved / "final")
    shutil.copyfile(run / "config.yaml", moved / "config.yaml")
    shutil.copytree(run / "final", tmp_path / "odd" / "model")
    shutil.copyfile(run / "config.yaml", tmp_path / "odd" / "config.yaml")
    for given in (run, run / "final", run / "best", run / "config.yaml", moved, tmp_path / "odd" / "model"):
        with pytest.raises(UserError, match=r"metric.py is Python code .* name it on the command line: evaluate.task=\S+"):
            evaluate(str(given), ["evaluate.limit=2"], out=tmp_path / "out")
    assert not ran.exists()
    evaluate(str(run), task="loss", out=tmp_path / "out")  # another task does not load the file
    generate(str(run), prompt=["abc:"], max_new_tokens=2)
    report(run)
    assert not ran.exists()
    results = evaluate(str(run), [f"evaluate.task={folder / 'metric.py'}"], limit=2, out=tmp_path / "out")
    assert ran.exists() and "length" in results["metrics"]


def test_a_configuration_of_ones_own_is_a_permission(theirs, tmp_path):
    run, _, ran = theirs
    own = tmp_path / "own.yaml"
    shutil.copyfile(run / "config.yaml", own)  # naming a file is a permission
    assert not load_config(own).unasked
    results = evaluate(str(own), limit=2, out=tmp_path / "out")
    assert ran.exists() and "length" in results["metrics"]


def test_while_training(theirs):
    run, _, ran = theirs
    generator = find_target(str(run)).load(devices=ONE)
    own = shutil.copyfile(run / "config.yaml", run.parent / "own.yaml")
    for path, refused in ((run / "config.yaml", True), (own, False)):
        setup = SimpleNamespace(
            config=load_config(path), model=generator.model, mesh=generator.engine.mesh,
            runtime=SimpleNamespace(dtype="float32"), source=None,
        )  # fmt: skip
        if refused:
            with pytest.raises(UserError, match=r"evaluate.task=\S+metric.py"):
                make_observer(setup, generator.tokenizer, None)
            assert not ran.exists()
        else:
            make_observer(setup, generator.tokenizer, None)
            assert ran.exists()


def test_tasks_of_lm_eval(theirs):
    """A task's YAML names functions of Python files next to it; so does a folder of tasks."""
    run, folder, ran = theirs
    with pytest.raises(UserError, match=r"'check.lm_eval_tasks=\[\S+task.yaml\]'"):
        check(str(run))
    with pytest.raises(UserError, match=r"evaluate.lm_eval.include_path=\S+"):
        evaluate_harness(str(run), tasks=["theirs"])
    with pytest.raises(UserError, match=r"'evaluate.lm_eval.tasks=\[\S+task.yaml\]'"):
        evaluate_harness(str(run), [f"evaluate.lm_eval.include_path={folder}"])
    assert not ran.exists()
    found = find_target(str(run), ["check.lm_eval_tasks=[x.yaml]", "evaluate.lm_eval={include_path: here}"])
    assert found.config.unasked == {"evaluate.task", "objective.rewards", "objective.environment"}


@pytest.mark.parametrize("reference", ["${oc.env:FTJAX_TEST_SECRET}", "${oc.${x}:FTJAX_TEST_SECRET}", "\\\\${oc.env:HOME}"])
def test_the_environment(changed, tmp_path, monkeypatch, reference):
    """A model's name is sent to the Hub, so a run's file may not put a variable into it; the command line may."""
    monkeypatch.setenv("FTJAX_TEST_SECRET", "secret")
    run = changed(model={"path": f"someone/{reference}"})
    odd = shutil.copytree(run / "final", tmp_path / "odd" / "model")
    shutil.copyfile(run / "config.yaml", odd.parent / "config.yaml")
    for command in (evaluate, check, lambda given: export(given, tmp_path / "out"), lambda given: report(Path(given))):
        for given in (run, odd):
            with pytest.raises(UserError, match=r"config.yaml:\d+:\d+: model.path: .*oc.*on the command line: model.path="):
                command(str(given))
    with pytest.raises(UserError, match="somebody else's"):
        load_config(run / "config.yaml")
    assert load_config(run / "config.yaml", ["model.path=${oc.env:FTJAX_TEST_SECRET}"]).model.path == "secret"


def test_references_that_read_nothing_else(changed, tmp_path):
    run = changed(model={"revision": "${.path}", "tokenizer": "\\${oc.env:HOME}"})
    found = load_config(run / "config.yaml").model
    assert found.revision == found.path and found.tokenizer == "${oc.env:HOME}"


def test_the_environment_in_an_adapters_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_TEST_SECRET", "secret")
    adapter = shutil.copytree(run / "final", tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    named = "someone/${oc.env:FTJAX_TEST_SECRET}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": named}))
    for command in (evaluate, lambda given: export(given, tmp_path / "out", merge=True)):
        with pytest.raises(UserError, match=re.escape(named)):
            command(str(adapter))
    assert config_of({"model": {"path": named}, "data": {"train": "-"}}).model.path == named


def test_what_is_refused_follows_the_schema(theirs):
    """Each setting that is known to run code exists in the schema and counts as set by the run."""
    from ftjax.config.code import LEADS_TO_CODE, setting
    from ftjax.config.rewards import GrpoConfig, RlooConfig

    config = load_config(theirs[0] / "config.yaml")
    assert config.unasked == set(LEADS_TO_CODE)
    own = {key for key in LEADS_TO_CODE if not key.startswith("objective.")}  # those are of another objective than this run's
    assert all(LEADS_TO_CODE[key](setting(config, key)) for key in own)
    assert {"rewards", "environment"} <= GrpoConfig.model_fields.keys() & RlooConfig.model_fields.keys()
    assert config.model_copy(update={"output_dir": "x"}).unasked == config.unasked
