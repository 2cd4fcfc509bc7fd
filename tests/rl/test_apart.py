"""Answers that are generated on devices of their own, one update behind (`mesh.rollout_devices`)."""

import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reward_runs import early, logged, run, settings
from whole_runs import rows, same_adapter

from ftjax.config import Config, MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import divided
from ftjax.rl.learn import Learning
from ftjax.rl.sampler import Sampler
from ftjax.rl.source import RolloutBatches
from ftjax.train.loop import Run
from ftjax.train.run import train

MESH = {"fsdp": 2, "tensor": 2}
GROUPS = {"importance_sampling_correction": "token_truncate"}
DEVICES = jax.devices()[:8]


def config(model, prompts, out, objective=None, mesh=None, **training):
    values = settings(model, prompts, out, {**GROUPS, "rewards": early(prompts), **(objective or {})}, **training)
    return Config.model_validate({**values, "mesh": {**MESH, "rollout_devices": 4} if mesh is None else mesh})


class Behind(RolloutBatches):
    """Generates on the devices that train, with the parameters of the update before the latest."""

    before = None

    def _prepared(self, params):
        return super()._prepared(params if self.before is None else self.before)

    def next(self, params):
        copy = jax.tree.map(jnp.copy, dict(params))
        batch = super().next(params)
        self.before = copy
        return batch


class BehindLearning(Learning):
    def make_source(self, setup, tokenizer, split):
        made = super().make_source(setup, tokenizer, split)
        made.__class__ = Behind
        return made


@pytest.fixture(scope="module")
def whole(model, prompts, tmp_path_factory):
    """A run of six updates, in which nothing waits for an update, and what it does in which order."""
    out, said = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "wait", None)

        def noted(what, of, method):
            kept = getattr(of, method)
            patch.setattr(of, method, lambda self, *given, **more: (said.append(what), kept(self, *given, **more))[1])

        noted("generate", Sampler, "generate")
        noted("start", Run, "look")  # just before an update is dispatched
        run(config(model, prompts, out, save_steps=3, gradient_accumulation_steps=2), devices=DEVICES)
    return out, said


def losses(folder):
    return [row["train/loss"] for row in rows(folder) if "train/loss" in row]


def test_answers_are_one_update_behind(whole, model, prompts, tmp_path):
    """Losses are those of a run that generates on the devices that train, with parameters that it has kept, in turn."""
    given = config(model, prompts, tmp_path, mesh=MESH, save_steps=3, gradient_accumulation_steps=2)
    learning = BehindLearning(given)
    train(given, devices=DEVICES[:4], make_observer=learning.make_observer, make_source=learning.make_source)
    np.testing.assert_allclose(losses(whole[0]), losses(tmp_path), rtol=1e-4, atol=1e-6)
    gaps = [row["train/rollout/logprob_gap"] for row in rows(whole[0]) if "train/rollout/logprob_gap" in row]
    assert gaps[0] < 1e-5 < 1e-4 < min(gaps[1:]), "the first answers are of the parameters that they train"


def test_the_first_update_is_that_on_the_policy(whole, model, prompts, tmp_path):
    run(config(model, prompts, tmp_path, mesh=MESH, max_steps=2, gradient_accumulation_steps=2), devices=DEVICES[:4])
    first, second = losses(tmp_path)
    assert losses(whole[0])[0] == pytest.approx(first, rel=1e-5) and losses(whole[0])[1] != pytest.approx(second, rel=1e-3)


def test_generation_and_update_overlap(whole):
    """An update is dispatched before the next answers are generated, and nothing waits for it between."""
    assert whole[1] == ["generate"] + ["start", "generate"] * 5 + ["start"]


def test_resumed(whole, model, prompts, tmp_path):
    """To the bit: the checkpoint has the answers that the parameters before its own have generated."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    for path in (out / "checkpoints" / "6", out / "final"):
        shutil.rmtree(path)
    run(config(model, prompts, out, save_steps=3, gradient_accumulation_steps=2), devices=DEVICES)
    same_adapter(whole[0], out)
    assert logged(out) == logged(whole[0])


def test_a_reward_that_fails_ahead_loses_nothing(model, prompts, tmp_path):
    """It is asked about update 4 when update 3 is saved."""
    (tmp_path / "fails.py").write_text(
        "def early(completions, trainer_state, **columns):\n"
        "    assert trainer_state.global_step != 4, 'the fourth'\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    given = config(model, prompts, tmp_path / "run", {"rewards": [str(tmp_path / "fails.py")]}, save_steps=3)
    with pytest.raises(UserError, match="the fourth"):
        run(given, devices=DEVICES)
    assert losses(tmp_path / "run") and (tmp_path / "run" / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize(
    "objective, mesh, message",
    [
        ({"importance_sampling_correction": None}, {}, "set objective.importance_sampling_correction: token_truncate"),
        ({"num_iterations": 2}, {}, "num_iterations 2 uses them again; set it to 1"),
        ({"name": "rloo", "importance_sampling_correction": "x"}, {}, "rloo"),
        ({}, {"slices": 2, "data": 2}, "set mesh.slices: 1"),
    ],
)
def test_where_it_cannot_work(objective, mesh, message):
    given = {"name": "grpo", "rewards": ["exact_match"], **GROUPS, **objective}
    if given["name"] == "rloo":
        del given["importance_sampling_correction"]
    values = {"model": {"path": "m"}, "data": {"train": "x.jsonl"}, "objective": given, "training": {"global_batch_size": 8}}
    with pytest.raises(ValueError, match=f"mesh.rollout_devices: .*{message}"):
        Config.model_validate({**values, "mesh": {"rollout_devices": 4, **mesh}})


def test_devices_that_are_not_there():
    with pytest.raises(UserError, match=r"8 of 8 device\(s\) leave none to train on; choose at most 7"):
        divided(MeshConfig(rollout_devices=8), DEVICES)
    several = [SimpleNamespace(process_index=number // 2) for number in range(4)]
    with pytest.raises(UserError, match="sent weights by other processes"):
        divided(MeshConfig(rollout_devices=2), several)
    assert divided(MeshConfig(rollout_devices=3), DEVICES) == (DEVICES[:5], DEVICES[5:])
