"""Log-probabilities of the sampler: those that tokens were drawn with, and the trainer's for the same text."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import load, one_device
from reward_runs import early, make_config, run
from transformers import AutoModelForCausalLM
from whole_runs import rows

from ftjax.config import ModelConfig
from ftjax.generate.session import Generator
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.rl.batch import Answered, arranged, filled, width_of

SETTINGS = {
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 0.7, "top_k": 7, "min_p": 0.01, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_log_probabilities_of_what_was_drawn(name, model):
    made, params = load(model)
    tokenizer = load_tokenizer(ModelConfig(path=str(model)))
    generator = Generator.of(made, params, tokenizer, mesh=one_device(), dtype=jnp.float32, of_sampler=True)
    prompts = [[1, 5, 6], [1, 9]]
    answers = generator.generate(prompts, max_new_tokens=6, logprobs=True, seed=3, **SETTINGS[name])
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        for at, token in enumerate(answer.tokens):
            text = [*prompt, *answer.tokens[:at]]
            with torch.no_grad():
                logits = theirs(torch.tensor([text])).logits[0, -1].double().numpy()
            wanted = expected(logits, text, **SETTINGS[name])
            assert answer.logprobs[at] == pytest.approx(wanted[token], abs=1e-4)
    if name == "plain":
        found = generator.score(prompts, [answer.tokens for answer in answers])
        for one, answer in zip(found, answers, strict=True):
            np.testing.assert_allclose(one.logprobs, answer.logprobs, atol=1e-5)


def expected(logits, text, temperature, top_k=None, min_p=0.0, repetition_penalty=1.0) -> np.ndarray:
    """Return the log-probabilities after transformers' processors, in their order."""
    seen = np.isin(np.arange(len(logits)), text)
    logits = (
        np.where(seen, np.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty), logits) / temperature
    )
    if top_k:
        logits = np.where(logits >= np.sort(logits)[-top_k], logits, -np.inf)
    logits = np.where(np.exp(logits - logits.max()) >= min_p, logits, -np.inf)
    return logits - np.logaddexp.reduce(logits)


def test_sampler_and_trainer_agree_to_rounding(model, prompts, tmp_path):
    """While the weights move, with another temperature than 1, packed and not."""
    for packing in (True, False):
        out = tmp_path / str(packing)
        objective = {"rewards": early(prompts), "temperature": 1.3, "num_iterations": 1}
        run(make_config(model, prompts, out, objective, max_steps=3, data={"packing": packing}))
        gaps = [row["train/rollout/logprob_gap"] for row in rows(out) if "train/loss" in row]
        assert len(gaps) == 3 and 0 < max(gaps) < 2e-6
    one, other = (
        [row["train/grad_norm"] for row in rows(tmp_path / name) if "train/loss" in row] for name in ("True", "False")
    )
    np.testing.assert_allclose(one, other, rtol=1e-3)  # packed or not, the updates are the same


def test_rows_of_answers():
    answers = [
        Answered([5, 6], [7, 2], 0.5, [-1.0, -2.0], [-1.5, -2.5]),
        Answered([1], [4], -1.0, [-3.0], [-3.0], trained=False),
        Answered([1, 2, 3], [4, 2], 1.0, [-0.5, -0.25], [-0.5, -0.25]),
    ]
    plan, rows_ = arranged(answers, 8, packing=True, multiple=2)
    assert (len(plan), rows_) == (2, 2)
    batch = filled(answers, plan, range(3), 8, 3)
    flat = {name: values.reshape(3, 8, -1) for name, values in batch.items()}
    row = next(number for number in range(2) if 5 in flat["tokens"][number])
    at = int(np.flatnonzero(flat["tokens"][row, :, 0] == 5)[0])
    assert flat["targets"][row, at : at + 4, 0].tolist() == [6, 7, 2, 0]
    assert flat["weights"][row, at : at + 4, 0].tolist() == [0, 1, 1, 0]
    assert flat["labels"][row, at : at + 4].tolist() == [[0, 0, 0], [0.5, -1, -1.5], [0.5, -2, -2.5], [0, 0, 0]]
    assert flat["weights"].sum() == 4 and not flat["segment_ids"][2].any()  # the third row is padding
    assert sorted(flat["segment_ids"].max(axis=(1, 2)).tolist()) == [0, 1, 2]
    assert [Answered.of(one.state()) for one in answers] == answers
    assert width_of(answers, 64, packing=False, multiple=1) == 16
