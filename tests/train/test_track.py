"""Tests what TensorBoard and MLflow receive from a run."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

from ftjax.errors import UserError
from ftjax.train.track import Tracker

CONFIG = {
    "model": {"path": "base", "revision": None},
    "method": {"name": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"], "use_dora": False, "rank_pattern": {}},
    "optimizer": {"learning_rate": 1e-4, "groups": []},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder of a run that was started twice in the same second."""
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now)
    for first in (0, 1):
        tracker = Tracker(tmp_path, ["tensorboard"], CONFIG, active=True, resume_from=first)
        tracker.log(first + 1, {"train/loss": 2.0 - first})
        tracker.close()
    return tmp_path / "tensorboard"


def test_settings_are_hyperparameters(folder):
    """TensorBoard's own plugin reads them as those of the run itself, not of a second one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    assert len(list(folder.iterdir())) == 2 and not [one for one in folder.iterdir() if one.is_dir()]
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert found == {
        "model.path": "base", "method.name": "lora", "method.r": 8.0, "method.target_modules": '["q_proj", "v_proj"]',
        "method.use_dora": False, "optimizer.learning_rate": 1e-4,
    }  # fmt: skip
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert {info.name for info in experiment.hparam_infos} == set(found)
    assert "train/loss" in [info.name.tag for info in experiment.metric_infos]


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """A client of a store in files, for the runs that this test makes."""
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed (extra: mlflow)")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    import mlflow

    return mlflow.MlflowClient()


@pytest.mark.filterwarnings("ignore")  # of its dependencies
def test_a_run_at_mlflow(mlflow, tmp_path):
    """A start that goes on adds to the same run; another run is another."""
    for first, name in ((0, "a"), (1, "a"), (0, "b")):
        tracker = Tracker(tmp_path, ["mlflow"], CONFIG, active=True, resume_from=first, run_id=name)
        tracker.log(first + 1, {"train/loss": 2.0 - first})
        tracker.log_texts(first + 1, "eval/generations", [{"prompt": "Hi", "text": "Ho"}])
        tracker.close()
    experiment = mlflow.get_experiment_by_name("mine").experiment_id
    runs = {run.data.tags["ftjax.run"]: run for run in mlflow.search_runs([experiment])}
    assert set(runs) == {"a", "b"} and runs["a"].info.status == "FINISHED"
    history = mlflow.get_metric_history(runs["a"].info.run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [(1, 2.0), (2, 1.0)]
    assert runs["a"].data.params["method.r"] == "8" and runs["a"].data.params["method.target_modules"] == '["q_proj", "v_proj"]'
    files = [one.path for one in mlflow.list_artifacts(runs["a"].info.run_id, "eval/generations")]
    assert len(files) == 2
    text = mlflow.download_artifacts(runs["a"].info.run_id, files[0])
    assert json.loads(Path(text).read_text()) == {"prompt": "Hi", "text": "Ho"}


@pytest.mark.filterwarnings("ignore")
def test_an_mlflow_that_cannot_be_reached(mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    with pytest.raises(UserError, match=r"report_to: mlflow cannot start: .*MLFLOW_TRACKING_URI"):
        Tracker(tmp_path, ["mlflow"], CONFIG, active=True)
