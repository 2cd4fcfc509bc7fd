"""Tests that a second model's pass waits for that of the first: see `Forward.after`."""

import jax
import pytest
from oracle import Case, context, load, make_hf, one_device, tokens

from ftjax.config import Config
from ftjax.hub.vocabulary import hf_config_of
from ftjax.objectives.objective import Forward, LossInputs
from ftjax.train.setup import compile_steps, design

OBJECTIVES = {
    "dpo": {"name": "dpo"},
    "dpo with sorted pairs": {"name": "dpo", "loss_type": ["sigmoid", "aot_unpaired", "sft"]},
    "kto": {"name": "kto"},
    "grpo": {
        "name": "grpo",
        "beta": 0.1,
        "num_generations": 2,
        "max_completion_length": 8,
        "rewards": [{"name": "exact_match"}],
    },
    "distill": {"name": "distill"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_second_model_waits(name, tmp_path, monkeypatch):
    waiting, begun, after, hidden = [], [], Forward.after, Forward.hidden.fget

    def recorded(self, found):
        waiting.append(after(self, found))
        return waiting[-1]

    def read(self):
        if not isinstance(self, LossInputs):
            begun.append(self)
        return hidden(self)

    monkeypatch.setattr(Forward, "after", recorded)
    monkeypatch.setattr(Forward, "hidden", property(read))
    make_hf(Case("llama", "llama", {}), tmp_path)
    teacher = {"teacher_model_name_or_path": str(tmp_path)} if name == "distill" else {}
    config = Config.model_validate({
        "model": {"path": str(tmp_path)}, "method": {"name": "lora", "r": 2}, "objective": {**OBJECTIVES[name], **teacher},
        "training": {"global_batch_size": 2}, "data": {"train": "none", "max_length": 16},
    })  # fmt: skip
    mesh = one_device()
    with jax.set_mesh(mesh):
        made = design(config, hf_config_of(config), mesh)
        step, _, optimizer, _ = compile_steps(made, 1)
        jax.eval_shape(step, *made.abstract_inputs(optimizer))
    assert waiting, "no second model was asked for"
    assert begun and all(any(one is other for other in waiting) for one in begun)


def test_a_pass_depends_on_what_it_waits_for(tmp_path):
    make_hf(Case("llama", "llama", {}), tmp_path)
    model, params = load(tmp_path)
    ids = tokens(1, 2)

    def read(found):
        return Forward(model, {}, params, {"tokens": ids}, context(ids), 1).after(found).batch["tokens"]

    jaxpr = jax.make_jaxpr(read)(1.0).jaxpr
    [barrier] = [one for one in jaxpr.eqns if one.primitive.name == "optimization_barrier"]
    assert jaxpr.outvars[0] in barrier.outvars
    assert len(barrier.invars) == 2
