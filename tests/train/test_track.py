"""Tests what TensorBoard receives from a run."""

import time

import pytest

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
