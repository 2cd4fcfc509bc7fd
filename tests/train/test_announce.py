"""Tests the advice that a run prints at its end."""

import json

import pytest

from ftjax.config import Config
from ftjax.train.announce import next_commands


def advised(tmp_path, **method):
    config = Config.model_validate({"model": {"path": "base"}, "method": method, "data": {"train": "x.jsonl"}})
    return [line for line in next_commands(tmp_path, config) if "--portable" in line]


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_portable_adapter_where_vllm_would_pass_over_a_pattern(tmp_path, name):
    [line] = advised(tmp_path, name="lora", **{name: {"v_proj": 2}})
    assert f"ftjax export {tmp_path} --out {tmp_path / 'portable'} --portable (vLLM ignores {name})" in line


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"bias": "all"}])
def test_none_where_it_is_not_needed_or_would_be_refused(tmp_path, more):
    assert not advised(tmp_path, name="lora", **more, **({"rank_pattern": {"v_proj": 2}} if more else {}))
    assert not advised(tmp_path, name="ia3")


def test_patterns_of_the_folder_that_a_run_starts_from(tmp_path):
    """They replace those of the configuration, and are in the adapter that the run writes."""
    (tmp_path / "final").mkdir()
    saved = {"peft_type": "LORA", "r": 4, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"q_proj": 3}}
    (tmp_path / "final" / "adapter_config.json").write_text(json.dumps(saved))
    [line] = advised(tmp_path, name="lora", adapter_path="elsewhere")
    assert "vLLM ignores rank_pattern and alpha_pattern" in line
