"""Answers that share their prompt in a row are trained as answers that each have it."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import CASES
from oracle import ONE, make_hf
from reward_runs import make_config, write_prompts
from tiny_tokenizer import save_tokenizer

from ftjax.rl.batch import Answered, arranged, filled, shares_prompts, together
from ftjax.train.setup import prepare
from ftjax.train.step import Runtime

PROMPTS = [[1, 9, 8, 7], [1, 5, 6], [4]]


def answer(prompt, length, seed, **more) -> Answered:
    rng = np.random.default_rng(seed)
    logprobs = (-rng.random(length)).tolist()
    return Answered(prompt, rng.integers(3, 90, length).tolist(), float(rng.normal()), logprobs, logprobs, **more)


def answers() -> list[Answered]:
    """Return 4 answers to one prompt, 3 to another, of which one is left out and one has tokens of others, and 2 to a third."""
    found = [answer(PROMPTS[0], length, length) for length in (3, 5, 1, 4)]
    found += [answer(PROMPTS[1], 4, 7), answer(PROMPTS[1], 2, 8, trained=False)]
    found += [answer(PROMPTS[1], 4, 9, trained=[True, False, False, True])]
    return [*found, answer(PROMPTS[2], 3, 10), answer(PROMPTS[2], 2, 11)]


def test_the_example_of_the_docstring():
    [one] = together([answer([5, 6], 2, 0), answer([5, 6], 2, 1)], 7)
    batch = filled([one], arranged([one], 8, True, 1)[0], [0, 1], 8, 3, shared=True)
    tokens = [5, *(token for each in one.answers for token in (6, *each.answer)), 0]
    assert batch["tokens"][0].tolist() == tokens
    assert batch["targets"][0].tolist() == [*tokens[1:], 0]
    assert batch["weights"][0].tolist() == [0, 1, 1, 0, 1, 1, 0, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 1, 2, 3, 0]
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
    assert batch["ends"][0].tolist() == [7, 4, 4, 4, 7, 7, 7, 0]
    assert not any(batch[name][1].any() for name in batch), "a row of padding"


@pytest.mark.parametrize("room, sizes", [(20, [4, 3, 2]), (16, [2, 2, 3, 2]), (9, [1] * 7 + [2]), (1, [1] * 9)])
def test_groups_that_do_not_fit_are_split(room, sizes):
    found = together(answers(), room)
    assert [len(one.answers) for one in found] == sizes
    assert [one for group in found for one in group.answers] == answers()
    assert all(len(one) <= room or len(one.answers) == 1 for one in found)


def rows_of(shared: bool, length: int) -> dict[str, np.ndarray]:
    documents = together(answers(), length) if shared else answers()
    plan, rows = arranged(documents, length, True, 1)
    return filled(documents, plan, range(rows), length, 3, shared)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma"])
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    [case] = [case for case in CASES if case.name == request.param]
    make_hf(case, folder)
    save_tokenizer(folder)
    write_prompts(folder)
    objective = {"num_iterations": 2, "beta": 0.1, "loss_type": "grpo"}
    return prepare(make_config(folder, folder, folder / "run", objective, method={"name": "full"}), ONE)


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
@pytest.mark.parametrize("length", [20, 11, 40])
def test_loss_and_gradient(prepared, attention, length):
    """With a reference, answers that are left out, and tokens that are not the model's; in one row, and split."""
    setup, runtime = prepared, Runtime(attention=attention)

    @jax.jit
    def run(params, batch):
        def loss(params):
            totals, _ = setup.loss_fn(params, setup.frozen, batch, runtime.context(batch))
            return totals.loss / totals.weight, totals.metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    (one, metrics), gradient = run(setup.params, rows_of(False, length))
    (other, other_metrics), other_gradient = run(setup.params, rows_of(True, length))
    assert float(one) == pytest.approx(float(other), rel=1e-5, abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), metrics, other_metrics)
    for path, value in gradient.items():
        scale = float(np.abs(value).max())
        np.testing.assert_allclose(other_gradient[path], value, atol=1e-5 * scale + 1e-7, err_msg=path)
    assert rows_of(True, length)["tokens"].size <= rows_of(False, length)["tokens"].size


def test_runs_that_share(prepared):
    assert shares_prompts(prepared)
    for section, change in (("data", {"packing": False}), ("objective", {"name": "sft"})):
        config = prepared.config.model_dump()
        config[section] = change if section == "objective" else config[section] | change
        assert not shares_prompts(dataclasses.replace(prepared, config=type(prepared.config).model_validate(config)))
    other = dataclasses.replace(prepared, runtime=Runtime(attention="splash_interpreted"))
    assert not shares_prompts(other)
