"""Tests the run folder: whether its contents belong to this run."""

import pytest
from tiny_run import make_config

from ftjax.config.load import save_config
from ftjax.errors import UserError
from ftjax.train.folder import open_run_folder


def begun(folder, **changes):
    """Return a folder with a checkpoint of this configuration, and the configuration with changes."""
    config = make_config(folder)
    data = folder / "a.jsonl"
    data.write_text('{"text": "a"}\n')
    config = config.model_copy(update={"data": config.data.model_copy(update={"train": str(data)})})
    config = config.model_copy(update={"output_dir": str(folder / "run")})
    (folder / "run" / "checkpoints" / "10").mkdir(parents=True)
    save_config(config, folder / "run" / "config.yaml")
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


def test_a_refused_resume_shows_both_values(tmp_path):
    config = begun(tmp_path, optimizer={"learning_rate": 0.5}, method={"target_modules": ["q_proj"] * 40})
    with pytest.raises(UserError) as caught:
        open_run_folder(config)
    said = str(caught.value)
    assert "optimizer.learning_rate: 0.5 (before: 0.0" in said and "Choose another output_dir" in said
    (line,) = [line for line in said.splitlines() if "target_modules" in line]
    assert "(before: all-linear)" in line and len(line) < 160


def test_other_data_that_is_not_there_is_said_first(tmp_path):
    with pytest.raises(UserError, match=r"b\.jsonl: no such file or folder"):
        open_run_folder(begun(tmp_path, data={"train": str(tmp_path / "b.jsonl")}))
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match=r"data\.train: .*b\.jsonl \(before: .*a\.jsonl\)"):
        open_run_folder(begun(tmp_path / "again", data={"train": str(tmp_path / "b.jsonl")}))
