"""`objective: {name: grpo}` and `rloo` are what TRL's trainers compute from the same answers: losses, metrics and gradients.

The model runs once for all settings, as in trl_oracle.py: log-probabilities and entropies of the tokens, each loss from those,
and the gradient of the weights from that of log-probabilities and entropies.
"""

import dataclasses
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from datasets import Dataset
from oracle import ONE
from peft import LoraConfig
from processes import ALL
from tiny_run import run_steps
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl_oracle import FULL, LORA, Found, compare, make_model

from ftjax.config import Config
from ftjax.objectives import objective_of
from ftjax.objectives.logprobs import TokenLogprobs
from ftjax.objectives.objective import Forward, LossInputs
from ftjax.train.means import Means
from ftjax.train.setup import prepare

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

ANSWERS, LONGEST, VOCABULARY, WIDTH = 8, 9, 64, 48


def make_answers() -> dict[str, np.ndarray]:
    """Return answers of several lengths to prompts of several lengths, one of them a single token and one untrained."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCABULARY, size) for size in rng.integers(2, 7, ANSWERS)]
    lengths = [LONGEST, 1, 4, 7, 3, 5, 2, 6]
    answers = [rng.integers(3, VOCABULARY, size) for size in lengths]
    values = {
        "advantage": rng.normal(size=ANSWERS).astype(np.float32),
        "logprob": [rng.normal(scale=0.3, size=size).astype(np.float32) for size in lengths],  # added to the model's own
        "sampler_logprob": [rng.normal(scale=0.3, size=size).astype(np.float32) for size in lengths],
    }
    return {"prompts": prompts, "answers": answers, "trained": [number != 3 for number in range(ANSWERS)], **values}


MADE = make_answers()


def packed(rows: list[list[int]], logprobs: list[np.ndarray], sampler: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return a batch with these answers in each row."""
    shape = (len(rows), WIDTH)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch |= {"weights": np.zeros(shape, np.float32), "labels": np.zeros((*shape, 3), np.float32)}
    for row, numbers in enumerate(rows):
        at = 0
        for segment, number in enumerate(numbers, 1):
            prompt, answer = MADE["prompts"][number], MADE["answers"][number]
            ids, length = np.concatenate([prompt, answer]), len(prompt) + len(answer)
            here, own = slice(at, at + length), slice(at + len(prompt) - 1, at + length - 1)
            batch["tokens"][row, here], batch["positions"][row, here] = ids, np.arange(length)
            batch["segment_ids"][row, here] = segment
            batch["targets"][row, at : at + length - 1] = ids[1:]
            batch["weights"][row, own] = MADE["trained"][number]
            batch["labels"][row, own] = np.stack(
                [np.full(len(answer), MADE["advantage"][number]), logprobs[number], sampler[number]], axis=-1
            )
            at += length
    return {**batch, "labels": batch["labels"].reshape(len(rows), -1)}


ROWS = [[0, 1, 2], [3, 4], [5], [6, 7]]


@dataclasses.dataclass(frozen=True)
class Known(LossInputs):
    """Inputs of a loss whose log-probabilities and entropies were computed before."""

    known: Any = None
    auxiliary = 0.0

    def token_logprobs(self, wanted=None, **_: Any) -> TokenLogprobs:
        there = self.batch["weights"] != 0
        return TokenLogprobs(*(jnp.where(there, one, 0) for one in self.known[:1]), None, jnp.where(there, self.known[1], 0))


class Ours:
    """A model that has moved away from its start, and the answers in packed rows."""

    def __init__(self, folder, method: dict, step: float):
        self._values = {
            "model": {"path": str(folder), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
            "method": method, "mesh": {"fsdp": 1}, "training": {"global_batch_size": len(ROWS)},
            "data": {"train": "unused.jsonl", "max_length": WIDTH},
        }  # fmt: skip
        self.setup = prepare(self._config({"name": "grpo", "beta": 0.1}), ONE)
        rng = np.random.default_rng(1)
        for name, value in self.setup.params.items():
            moved = np.asarray(value) + step * rng.normal(size=value.shape).astype(np.float32)
            self.setup.params[name] = jax.device_put(moved, value.sharding)
        empty = [np.zeros(len(answer), np.float32) for answer in MADE["answers"]]
        self.batch = packed(ROWS, empty, empty)
        ctx, setup = self.setup.runtime.context(self.batch), self.setup

        def run(model, params, frozen):
            found = Forward(model, params, frozen, self.batch, ctx, 512).token_logprobs(entropy=True)
            return found.logprobs, found.entropy

        @jax.jit
        def pull(params, frozen, cotangents):
            return jax.vjp(lambda params: run(setup.model, params, frozen), params)[1](cotangents)[0]

        self.known = jax.jit(partial(run, setup.model))(setup.params, setup.frozen)
        before = setup.reference
        self.reference = jax.jit(partial(run, before.model))({}, before.params(setup.frozen))
        self.pull = partial(pull, setup.params, setup.frozen)
        own = self.by_answer(self.known[0])
        self.old = [mine + made for mine, made in zip(own, MADE["logprob"], strict=True)]
        self.sampler = [mine + made for mine, made in zip(self.old, MADE["sampler_logprob"], strict=True)]
        self.batch = packed(ROWS, self.old, self.sampler)

    def by_answer(self, values) -> list[np.ndarray]:
        """Return the values `[B, T]` of the trained tokens of each answer; zeros for one that is not trained."""
        found = []
        for number, answer in enumerate(MADE["answers"]):
            row = next(index for index, numbers in enumerate(ROWS) if number in numbers)
            segment = ROWS[row].index(number) + 1
            there = (self.batch["segment_ids"][row] == segment) & (self.batch["weights"][row] > 0)
            found.append(np.asarray(values)[row][there] if there.any() else np.zeros(len(answer), np.float32))
        return found

    def _config(self, objective: dict) -> Config:
        sizes = {"num_generations": 2, "max_completion_length": LONGEST}
        return Config.model_validate({**self._values, "objective": {**sizes, **objective}})

    def with_objective(self, objective: dict):
        return dataclasses.replace(self.setup, config=self._config(objective))

    def whole(self, **objective: Any) -> Found:
        """The loss as training computes it."""
        setup = self.with_objective(objective)

        @partial(jax.value_and_grad, has_aux=True)
        def mean(params):
            totals, _ = setup.loss_fn(params, setup.frozen, self.batch, setup.runtime.context(self.batch))
            return totals.loss / totals.weight, totals

        (_, totals), gradients = jax.jit(mean)(setup.params)
        return self._found(totals, gradients)

    def __call__(self, **objective: Any) -> Found:
        """The same, from log-probabilities and entropies that are computed once."""
        setup = self.with_objective(objective)
        record, made = (
            objective_of(setup.config),
            partial(Known, setup.model, setup.params, setup.frozen, self.batch, None, 0, setup.config),
        )

        def mean(known):
            more = {"own_statistics": record.statistics}
            if record.reference(setup.config.objective):
                more["reference"] = made(known=self.reference)
            totals, _ = record.loss(made(known=known, **more))
            return totals.loss / totals.weight, totals

        cotangents, totals = jax.jit(jax.grad(mean, has_aux=True))(self.known)
        return self._found(totals, self.pull(cotangents))

    def _found(self, totals, gradients) -> Found:
        sums = Means()
        sums.add(jax.tree.map(float, {"loss": (totals.loss, totals.weight), **totals.metrics}))
        means = sums.means()
        return Found(means.pop("loss"), means, self.tensors(gradients))

    def tensors(self, values) -> dict[str, np.ndarray]:
        adapter, found = self.setup.config.method.name != "full", {}
        for path, spec in self.setup.model.trainable.items():
            for piece in spec.pieces():
                name = f"base_model.model.{piece.name.removesuffix('.weight')}.default.weight" if adapter else piece.name
                found[name] = np.asarray(values[path][piece.index])
        return found


class Theirs:
    """A trainer of TRL with the same weights and answers."""

    def __init__(self, folder, ours: Ours, out, kind=(GRPOTrainer, GRPOConfig), **options: Any):
        method, (trainer, config) = ours.setup.config.method, kind
        args = config(
            output_dir=str(out), per_device_train_batch_size=ANSWERS, num_generations=2, bf16=False, use_cpu=True,
            report_to="none", gradient_checkpointing=False, max_completion_length=LONGEST, **{"beta": 0.1, **options},
        )  # fmt: skip
        more = {}
        if method.name == "lora":
            more["peft_config"] = LoraConfig(r=method.r, lora_alpha=method.lora_alpha, target_modules=method.target_modules)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.trainer = trainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), reward_funcs=lambda completions, **_: [0.0],
            args=args, train_dataset=Dataset.from_list([{"prompt": "a"}] * ANSWERS), processing_class=tokenizer, **more,
        )  # fmt: skip
        self.trained = {name: tensor for name, tensor in self.trainer.model.named_parameters() if tensor.requires_grad}
        values = ours.tensors(ours.setup.params)
        assert self.trained.keys() == values.keys()
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.copy_(torch.tensor(values[name]).reshape(tensor.shape))
        self.ours = ours

    def batch(self) -> dict[str, torch.Tensor]:
        """Prompts padded on the left, answers on the right."""

        def answers(values, dtype=torch.float32):
            return torch.tensor(np.stack([np.pad(one, (0, LONGEST - len(one))) for one in values]), dtype=dtype)

        longest = max(map(len, MADE["prompts"]))
        prompts = [np.pad(one, (longest - len(one), 0)) for one in MADE["prompts"]]
        there = [np.pad(np.ones(len(one)), (longest - len(one), 0)) for one in MADE["prompts"]]
        mask = [np.full(len(one), float(trained)) for one, trained in zip(MADE["answers"], MADE["trained"], strict=True)]
        reference = self.ours.by_answer(self.ours.reference[0])
        return {
            "prompt_ids": torch.tensor(np.stack(prompts)), "prompt_mask": torch.tensor(np.stack(there)).long(),
            "completion_ids": answers(MADE["answers"], torch.long), "completion_mask": answers(mask, torch.long),
            "advantages": torch.tensor(MADE["advantage"]), "num_items_in_batch": answers(mask).sum(),
            "ref_per_token_logps": answers(reference), "old_per_token_logps": answers(self.ours.old),
            "sampling_per_token_logps": answers(self.ours.sampler),
        }  # fmt: skip

    def __call__(self, *, correction=None, bounds=(None, 3.0), on_policy=False, **settings: Any) -> Found:
        trainer, batch = self.trainer, self.batch()
        if on_policy:
            del batch["old_per_token_logps"]
        if correction:
            batch["importance_sampling_ratio"] = self.ratio(batch, correction, *bounds)
        else:
            del batch["sampling_per_token_logps"]
        if isinstance(trainer, RLOOTrainer):
            batch["old_logps"] = (batch["old_per_token_logps"] * batch["completion_mask"]).sum(1)
            batch["advantages"] *= batch["completion_mask"].any(1)  # TRL adds that of an answer without trained tokens
        with pytest.MonkeyPatch.context() as patch:
            low = settings.get("epsilon", 0.2)
            derived = {"epsilon_low": low, "epsilon_high": settings.get("epsilon_high") or low, "use_vllm": bool(correction)}
            derived["_entropy_bonus_enabled"] = bool(settings.get("entropy_coef"))
            for name, value in {**settings, **derived}.items():
                patch.setattr(trainer.args, name, value, raising=False)
                patch.setattr(trainer, name, value, raising=False)
            patch.setattr(trainer, "vllm_importance_sampling_correction", bool(correction), raising=False)
            patch.setattr(trainer, "current_gradient_accumulation_steps", 1, raising=False)
            patch.setattr(trainer.args, "steps_per_generation", 1)
            trainer.model.train()
            trainer.model.zero_grad()
            loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        trainer._metrics["train"].clear()
        return Found(loss.item(), metrics, {name: tensor.grad.numpy().copy() for name, tensor in self.trained.items()})

    @staticmethod
    def ratio(batch, correction, low, high) -> torch.Tensor:
        """As `_generate_and_score_completions` computes it."""
        logs = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * batch["completion_mask"]
        if correction.startswith("sequence"):
            logs = logs.sum(-1, keepdim=True)
        ratio = torch.exp(logs)
        if correction.endswith("truncate"):
            return torch.clamp(ratio, min=low, max=high)
        outside = (ratio < (low if low is not None else -np.inf)) | (ratio > (high if high is not None else np.inf))
        return ratio.masked_fill(outside, 0.0)


SEQUENCE = {"importance_sampling_level": "sequence"}
OFF = {"num_iterations": 2}  # the ratio to the sampling policy is not 1
CLIPPED_OR_SMOOTH = ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo", "vespo")
CASES = {
    **{
        f"{name}-{level}": {"loss_type": name, "importance_sampling_level": level, "epsilon": 0.1, "epsilon_high": 0.3, **OFF}
        for name in CLIPPED_OR_SMOOTH
        for level in ("token", "sequence")
    },
    **{
        f"cispo-{level}": {"loss_type": "cispo", "importance_sampling_level": level, "epsilon_high": 1.1, **OFF}
        for level in ("token", "sequence")
    },
    "defaults": {},
    "delta": {"delta": 1.2, "epsilon": 0.1, **OFF},
    "kl": {"beta": 0.3, **OFF},
    "kl-plain": {"beta": 0.3, "use_bias_correction_kl": False, "loss_type": "grpo", **OFF},
    "entropy": {"entropy_coef": 0.2, **OFF},
    "entropy-answers": {"entropy_coef": 0.2, "loss_type": "grpo", **OFF},
    "entropy-constant": {"entropy_coef": 0.2, "loss_type": "dr_grpo", **OFF},
    "uncertain": {"top_entropy_quantile": 0.4, "entropy_coef": 0.1, "loss_type": "bnpo", **OFF},
    "off-policy": {"off_policy_mask_threshold": 0.05, **OFF},
    "sapo-temperatures": {"loss_type": "sapo", "sapo_temperature_neg": 1.5, "sapo_temperature_pos": 0.7, **OFF},
    "vespo-others": {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.0, **OFF},
}  # fmt: skip
CORRECTIONS = {
    "token_truncate": (None, 1.2), "token_mask": (0.8, 1.2), "sequence_truncate": (0.9, 1.1), "sequence_mask": (0.5, 1.3),
}  # fmt: skip
METRICS = {"entropy"}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)
    ours = Ours(folder, LORA, 0.3)
    return ours, Theirs(folder, ours, tmp_path_factory.mktemp("out"))


def ours_and_theirs(settings: dict) -> tuple[dict, dict]:
    """Settings of either side; `max_completion_length` is that of the trainer."""
    mine = {"name": "grpo", "num_generations": 2, "max_completion_length": LONGEST, **settings}
    theirs = {"loss_type": "dapo", "beta": 0.0, **settings}
    return mine, {**theirs, "on_policy": theirs.pop("num_iterations", 1) == 1}


@pytest.mark.parametrize("name", CASES)
def test_losses(sides, name):
    ours, theirs = sides
    mine, other = ours_and_theirs(CASES[name])
    compare(ours(**mine), theirs(**other), METRICS)


@pytest.mark.parametrize("name", ["defaults", "grpo-sequence", "luspo-token", "entropy-answers"])
def test_what_an_environment_says(sides, name, monkeypatch):
    """Tokens in an answer that are not the model's count as little as in TRL."""
    own = [np.ones(len(answer), np.float32) for answer in MADE["answers"]]
    own[0][3:6], own[5][1], own[7][2:4] = 0, 0, 0
    ours, theirs = copy(sides[0]), sides[1]
    empty = [np.zeros(len(answer), np.float32) for answer in MADE["answers"]]
    kept = packed(ROWS, own, empty)["labels"].reshape(len(ROWS), WIDTH, 3)[..., 1]
    ours.batch = {**ours.batch, "weights": ours.batch["weights"] * kept}
    batch = theirs.batch()
    mask = torch.tensor(np.stack([np.pad(one, (0, LONGEST - len(one))) for one in own])).long()
    count = (batch["completion_mask"] * mask).sum()
    monkeypatch.setattr(theirs, "batch", lambda: {**batch, "tool_mask": mask, "num_items_in_batch": count})
    mine, other = ours_and_theirs(CASES[name])
    compare(ours(**mine), theirs(**other), METRICS)


@pytest.mark.parametrize("kind", CORRECTIONS)
@pytest.mark.parametrize("loss", ["dapo", "vespo"])
def test_corrections_of_the_sampler(sides, kind, loss):
    ours, theirs = sides
    low, high = CORRECTIONS[kind]
    mine, other = ours_and_theirs({"loss_type": loss, "off_policy_mask_threshold": 0.05, **OFF})
    more = {"importance_sampling_clip_min": low, "importance_sampling_clip_max": high}
    got = ours(**mine, importance_sampling_correction=kind, **more)
    compare(got, theirs(**other, correction=kind, bounds=(low, high)), METRICS)


# Families and methods, how far the weights are moved, and settings; the loss is that of training.
MODELS = {
    "qwen3-full": ("qwen3", {"head_dim": 8}, FULL, 0.1, {"beta": 0.2, "entropy_coef": 0.1, "loss_type": "grpo", **OFF}),
    "gemma2-lora": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 6.0}, LORA, 0.3, {"beta": 0.2, **SEQUENCE, **OFF}),
    "llama-full": ("llama", {"tie_word_embeddings": True}, FULL, 0.1, {"top_entropy_quantile": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS if ALL else [*MODELS][:1])
def test_models(name, tmp_path):
    family, values, method, step, settings = MODELS[name]
    folder = make_model(tmp_path / "model", family, vocab_size=VOCABULARY, **values)
    ours = Ours(folder, method, step)
    mine, other = ours_and_theirs(settings)
    compare(ours.whole(**mine), Theirs(folder, ours, tmp_path / "out")(**other), METRICS)


def test_temperature(sides, tmp_path):
    """Log-probabilities and entropies are those of the distribution that was sampled from."""
    ours, _ = sides
    theirs = Theirs(ours.setup.config.model.path, ours, tmp_path, temperature=0.7)
    mine, other = ours_and_theirs({"loss_type": "dapo", "entropy_coef": 0.1})
    compare(ours.whole(**mine, temperature=0.7), theirs(**other), METRICS)


@pytest.mark.parametrize("settings", [{}, {"epsilon": 0.05, "epsilon_high": 0.1}], ids=["defaults", "bounds"])
def test_rloo(sides, settings, tmp_path):
    ours, _ = sides
    theirs = Theirs(ours.setup.config.model.path, ours, tmp_path, (RLOOTrainer, RLOOConfig))
    got = ours(name="rloo", max_completion_length=LONGEST, **settings, **OFF)
    compare(got, theirs(**settings), {"entropy", "clip_ratio/region_mean"})


SPLITS = [({"fsdp": 2, "sequence": 2, "tensor": 2}, 2)]
if ALL:
    SPLITS += [({"fsdp": 1}, 2), ({"data": 2, "fsdp": 2, "tensor": 2}, 1)]


@pytest.mark.parametrize("settings", [
    {"entropy_coef": 0.1, "top_entropy_quantile": 0.5, "beta": 0.1, **OFF},
    pytest.param({"loss_type": "grpo", "importance_sampling_correction": "sequence_mask", **SEQUENCE, **OFF},
                 marks=pytest.mark.sweep),
    pytest.param({"loss_type": "vespo", **OFF}, marks=pytest.mark.sweep),
], ids=["dapo", "gspo", "vespo"])  # fmt: skip
def test_any_split(sides, settings):
    """One row an answer or several, microbatches and meshes give one loss, one gradient and the same metrics."""
    ours, want = sides[0], None
    one_each = packed([[number] for number in range(ANSWERS)], ours.old, ours.sampler)
    for batch, mesh, microbatches in [
        (ours.batch, {"fsdp": 1}, 1), (one_each, {"fsdp": 1}, 1), *((ours.batch, *split) for split in SPLITS)
    ]:  # fmt: skip
        objective = {"name": "grpo", "num_generations": 2, "max_completion_length": LONGEST, **settings}
        values = {**ours._values, "mesh": mesh, "objective": objective}
        setup = prepare(Config.model_validate(values), None if len(mesh) > 1 else ONE)
        rng = np.random.default_rng(1)
        for name, value in setup.params.items():
            moved = np.asarray(value) + 0.3 * rng.normal(size=value.shape).astype(np.float32)
            setup.params[name] = jax.device_put(moved, value.sharding)
        (metrics,), _ = run_steps(setup, [batch], microbatches)
        got = {"loss": metrics.loss, "norm": metrics.grad_norm, **{k: a / b for k, (a, b) in metrics.metrics.items()}}
        want = want or got
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=1e-6, err_msg=f"{name} {mesh} {microbatches}")
