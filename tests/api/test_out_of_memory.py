"""Memory that runs out ends a run with what to change, with the plan's numbers, and with exit code 2."""

import json

import jax
import numpy as np
import pytest
from oracle import ONE
from tiny_settings import SETTINGS
from verbs import ftjax as command

import ftjax
from ftjax.api.settings import settings_of
from ftjax.hub.vocabulary import hf_config_of
from ftjax.out_of_memory import asked_for, is_out_of_memory
from ftjax.plan.out_of_memory import ACTIVATIONS, needs
from ftjax.train.setup import design, mesh_of

XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3221225472 bytes."


def fail_with(monkeypatch, error, place="ftjax.train.loop.Run.next_batch"):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(place, fail)


@pytest.mark.parametrize("place", ["ftjax.train.loop.Run.next_batch", "ftjax.train.setup.load_base"])
def test_a_run_that_has_no_memory_says_what_to_change(home, monkeypatch, capsys, place):
    """Also where it ended before there was a model."""
    (home / "run.yaml").write_text(json.dumps({**SETTINGS, "output_dir": "none"}))
    fail_with(monkeypatch, jax.errors.JaxRuntimeError(XLA), place)
    assert command("train", "run.yaml", "data.validation=train.jsonl") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "the host has no memory left: 3.221 GB were asked for" in said
    need = needs(design_of(settings_of("run.yaml")))
    assert f"frozen weights {need['weights'] / 1e3:.4g} kB" in said and f"optimizer {need['optimizer'] / 1e3:.4g} kB" in said
    for advice in (
        "model.remat: full (it is none)", "training.gradient_accumulation_steps: 4: one row of 64 tokens",
        "data.max_length: 32 (it is 64)", "training.eval_batch_size", "data.streaming",
    ):  # fmt: skip
        assert advice in said, advice
    with pytest.raises(ftjax.OutOfMemory, match="What to change") as caught:
        ftjax.train("run.yaml", devices=ONE, quiet=True)
    assert isinstance(caught.value, ftjax.UserError) and isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def design_of(config):
    mesh, _ = mesh_of(config, hf_config_of(config), ONE)
    return design(config, hf_config_of(config), mesh)


def test_the_advice_takes_less_memory(home):
    """Each setting that is advised lowers what is computed to be needed."""
    before = needs(design_of(settings_of(SETTINGS)))
    for change, kind in (
        ({"model__remat": "full"}, ACTIVATIONS), ({"training__gradient_accumulation_steps": 4}, ACTIVATIONS),
        ({"data__max_length": 32}, ACTIVATIONS), ({"model__quantization": "nf4"}, "weights"),
        ({"model__dtype": "bfloat16"}, "weights"),
    ):  # fmt: skip
        assert needs(design_of(settings_of(SETTINGS, change)))[kind] < before[kind], change
    full = {**SETTINGS, "method": {"name": "full"}}
    eighth = needs(design_of(settings_of(full, {"optimizer__state_dtype": "int8"})))
    assert eighth["optimizer"] < needs(design_of(settings_of(full)))["optimizer"] / 2


def test_the_numbers_are_those_of_a_plan(home):
    plan = ftjax.plan(SETTINGS, "cpu:1", mesh={"fsdp": 1})
    need = needs(design_of(settings_of(SETTINGS)))
    assert {kind: need[kind] for kind in ("weights", "trained", "optimizer", "input")} == {
        kind: plan.memory[kind] for kind in ("weights", "trained", "optimizer", "input")
    }
    assert plan.memory["temporaries"] > 0 and need[ACTIVATIONS] > 0


def test_inference_says_what_to_change(home, monkeypatch, capsys):
    fail_with(monkeypatch, jax.errors.JaxRuntimeError(XLA), "ftjax.generate.session.Generator.answer")
    assert command("generate", "runs/first", "--prompt", "Tom") == 2
    said = capsys.readouterr().err
    assert "out of memory (3.22 GB were asked for)" in said and "--batch-size" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "error, found, bytes_",
    [
        (jax.errors.JaxRuntimeError(XLA), True, 3221225472),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.5G of 15.7G hbm."), True, 20.5 * 2**30),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Quota exceeded for bucket"), False, None),
        (jax.errors.JaxRuntimeError("INTERNAL: memory is strange"), False, None),
        (RuntimeError("std::bad_alloc"), True, None),
        (MemoryError(), True, None),
        (ValueError("memory"), False, None),
    ],
)  # fmt: skip
def test_what_is_recognised(error, found, bytes_):
    assert is_out_of_memory(error) is found
    if found:
        assert asked_for(error) == bytes_


def test_numpys_error_is_recognised():
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 60, np.uint8)
    assert is_out_of_memory(caught.value) and asked_for(caught.value) == 2**60
