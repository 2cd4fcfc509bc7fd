"""Answers that are generated on devices of their own, one update behind (`mesh.rollout_devices`)."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from reward_runs import ECHO, early, logged, run, settings
from safetensors.numpy import load_file
from whole_runs import rows, same_adapter

from ftjax.config import Config, MeshConfig
from ftjax.errors import UserError
from ftjax.generate.answer import Generation
from ftjax.generate.finite import NotFinite
from ftjax.mesh import divided
from ftjax.rl import share
from ftjax.rl.learn import Learning
from ftjax.rl.sampler import Sampler
from ftjax.rl.source import RolloutBatches
from ftjax.train.loop import Run
from ftjax.train.run import train

MESH = {"fsdp": 2, "tensor": 2}
GROUPS = {"importance_sampling_correction": "token_truncate"}
DEVICES = jax.devices()[:8]


def values_of(model, prompts, out, objective=None, mesh=None, **training):
    values = settings(model, prompts, out, {**GROUPS, "rewards": early(prompts), **(objective or {})}, **training)
    return {**values, "mesh": {**MESH, "rollout_devices": 4} if mesh is None else mesh}


def config(*given, **more):
    return Config.model_validate(values_of(*given, **more))


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
    assert divided(MeshConfig(rollout_devices=3), DEVICES) == (DEVICES[:5], DEVICES[5:])


def test_devices_of_several_processes():
    """The last of each generate, in whatever order all are."""
    # As of hosts with four chips each, in rows of a torus: 0 1 4 5 / 2 3 6 7
    several = [
        SimpleNamespace(process_index=number // 4, id=number, device_kind="TPU v5p") for number in (0, 1, 4, 5, 2, 3, 6, 7)
    ]
    train, generate = divided(MeshConfig(rollout_devices=4), several)
    assert [[one.id for one in part] for part in (train, generate)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    train, generate = divided(MeshConfig(rollout_devices=2), several)
    assert [[one.id for one in part] for part in (train, generate)] == [[0, 1, 4, 5, 2, 6], [3, 7]]


@pytest.mark.parametrize(
    "count, each, message",
    [
        (4, 4, "for several hosts of v6e, .* only on all chips of a slice; leave it out"),
        (3, 4, r"3 of 8 devices on 2 processes \(hosts\): .*equally many .* and one has 4; choose 2 or 4, or leave it out"),
        (1, 4, "choose 2, or"),
        (7, 4, "one has 4; choose 6, or"),
        (8, 4, "8 of 8 devices .* choose 6, or"),
        (2, 1, "2 of 2 devices .* one has 1; leave it out, so that all devices generate and train in turn"),
    ],
)
def test_processes_that_cannot_have_equally_many(count, each, message):
    several = [SimpleNamespace(process_index=number // each, device_kind="TPU v6 lite") for number in range(2 * each)]
    with pytest.raises(UserError, match=f"mesh.rollout_devices: .*{message}"):
        divided(MeshConfig(rollout_devices=count), several)


# ---- several processes ----


def answer_in_shares(monkeypatch, requests, processes, answer):
    """Return what each of these processes gets, and the requests that it answers."""
    monkeypatch.setattr(share.store, "several", lambda: True)
    monkeypatch.setattr(share.store, "count", lambda: processes)
    told, asked = [], []

    def working(index, exchange):
        monkeypatch.setattr(share.store, "index", lambda: index)
        monkeypatch.setattr(share, "_exchange", exchange)
        return lambda: share.in_shares(requests, lambda own: asked.append(own) or answer(own))

    class Told(Exception):
        pass

    def telling(value):
        told.append(json.loads(json.dumps(value)))
        raise Told

    for index in range(processes):
        with pytest.raises(Told):
            working(index, telling)()
    return working(0, lambda value: told), asked


@pytest.mark.parametrize("count, sizes", [(7, [2, 2, 3]), (2, [0, 1, 1]), (0, [0, 0, 0])])
def test_shares(monkeypatch, count, sizes):
    answers = [Generation(f"ä\ud800{n}", [n, 1], "stop", [-0.1 / 3 - n, -1e-30], n) for n in range(count)]
    work, asked = answer_in_shares(monkeypatch, range(count), 3, lambda own: [answers[n] for n in own])
    assert list(map(len, asked)) == sizes and work() == answers


@pytest.mark.parametrize("error", [UserError, NotFinite])
def test_an_error_of_one_is_of_all(monkeypatch, error):
    def answer(own):
        if 1 in own:
            raise error("the second")
        return []

    work, _ = answer_in_shares(monkeypatch, range(2), 2, answer)
    with pytest.raises(UserError, match="the second") as caught:
        work()
    assert type(caught.value) is error


# Runs `ftjax`, and cannot answer for the fifth time, or is told to end then.
UNABLE = """
import os, signal
from ftjax.cli import main
from ftjax.errors import UserError
from ftjax.generate.session import Generator
answer, asked = Generator.answer, []
def unable(self, *given, **more):
    asked.append(1)
    if len(asked) == 5:
        raise UserError("the fifth")
    return answer(self, *given, **more)
Generator.answer = unable
main()
"""


def same_rows(got, want, tolerance=1e-5):
    """Assert that runs have logged the same: numbers as close as that, all else equal."""
    assert [row.keys() for row in got] == [row.keys() for row in want]
    for one, other in zip(got, want, strict=True):
        for name, value in other.items():
            assert one[name] == (pytest.approx(value, rel=tolerance, abs=tolerance) if isinstance(value, float) else value), (
                name
            )


TOLD = UNABLE.replace('raise UserError("the fifth")', "os.kill(os.getpid(), signal.SIGTERM)")


@pytest.mark.parametrize("fails", ["answering", "told", pytest.param("reward", marks=pytest.mark.sweep)])
def test_two_processes_do_what_one_does(whole, model, prompts, tmp_path, fails):
    """Two processes, of two devices each that train and two that generate, stop together where one of them cannot answer, or
    the reward fails, or one is told to end while it answers, and go on from the checkpoint before, which has the answers of
    parameters that it has not."""
    (tmp_path / "echo.py").write_text(ECHO)
    out, rewards = tmp_path / "run", [f"{tmp_path / 'echo.py'}:early"]
    values = values_of(model, prompts, out, {"rewards": rewards}, save_steps=3, gradient_accumulation_steps=2)
    if fails == "reward":
        asks = "(completions, trainer_state, **columns):\n    assert trainer_state.global_step != 5, 'the fifth'"
        (tmp_path / "echo.py").write_text(ECHO.replace("(completions, **columns):", asks, 1))
    code = {"answering": {1: UNABLE}, "told": {1: TOLD}}.get(fails)
    running, said = processes.run(2, values, out, devices=4, code=code)
    saved = max(int(path.name) for path in (out / "checkpoints").iterdir())  # what was before is saved
    if fails == "told":
        assert [process.returncode for process in running] == [1, 1] and f"SIGTERM: saved step {saved} of 6" in said[0], said
        assert saved in (4, 5)
    else:
        assert [process.returncode for process in running] == [2, 2] and all("the fifth" in text for text in said), said
        assert saved == 4
        shutil.rmtree(out / "checkpoints" / "4")
        saved = 3
    (tmp_path / "echo.py").write_text(ECHO)
    running, said = processes.run(2, values, out, devices=4)
    assert [process.returncode for process in running] == [0, 0] and f"resuming from step {saved}" in said[0], said
    assert "on 2 other device(s) of each of 2 processes, which answer a share each, tensor=2" in " ".join(said[0].split())
    same_rows(logged(out), logged(whole[0]))
    got, want = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (out, whole[0]))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
