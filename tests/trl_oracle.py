"""TRL's preference trainers beside ftjax's objectives: one batch of the same rows, from the same weights, in float32.

TRL tokenises and pads the rows itself; here they are packed. The trained weights are moved away from the reference before
anything is compared. A model is made once on either side, and its settings are changed between losses. Compiling a model takes
most of the time here, so `Ours.quick` runs it once for all losses: log-probabilities of the tokens, each loss from those, and
the gradient of the weights from that of the log-probabilities. `Ours.whole` is what training does.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from datasets import Dataset
from oracle import ONE, Case, make_hf
from peft import LoraConfig
from tiny_tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from ftjax.config import Config
from ftjax.data.pipeline import load_splits
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.objectives import encoding_of, objective_of
from ftjax.objectives.logprobs import TokenLogprobs
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import Forward, LossInputs
from ftjax.train.means import Means
from ftjax.train.setup import Setup, prepare
from ftjax.train.teacher import with_partners

LORA = {"name": "lora", "r": 4, "lora_alpha": 8}
FULL = {"name": "full"}

# Prompts and answers of one character up, the longer answer chosen or rejected, and two answers that begin alike.
PAIRS = [
    {"prompt": "a", "chosen": " yes, it is.", "rejected": " no"},
    {"prompt": "What is two plus two?", "chosen": " four", "rejected": " It is five, I think."},
    {"prompt": "Say: ", "chosen": "b", "rejected": "c"},
    {"prompt": "Name a colour (one word)\n", "chosen": "red", "rejected": "Monday, or else 7"},
    {"prompt": "x=3; x+1=", "chosen": "4, because 3+1=4", "rejected": "4"},
    {"prompt": "Hello ", "chosen": "there, my friend", "rejected": "there, fool"},
]


def messages(row: dict, *, implicit: bool = False) -> dict:
    """The row as a conversation, with its prompt in a column of its own or at the beginning of both answers."""
    prompt = [{"role": "user", "content": row["prompt"]}]
    answers = {kind: [{"role": "assistant", "content": row[kind]}] for kind in ("chosen", "rejected")}
    return {kind: prompt + answer for kind, answer in answers.items()} if implicit else {"prompt": prompt, **answers}


Documents = list[tuple[tuple[int, ...], tuple[int, ...]]]  # tokens, and which are trained


class Found(NamedTuple):
    """A loss, its metrics by name, and the gradient of each trained weight by transformers' or PEFT's name."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, np.ndarray]


def make_model(folder: Path, family: str = "llama", *, chat: bool = False, **values: Any) -> Path:
    """A tiny model with a tokenizer of single characters, which may have a chat template."""
    make_hf(Case(family, family, {"max_position_embeddings": 256, **values}), folder)
    save_tokenizer(folder, chat)
    return folder


def compare(ours: Found, theirs: Found, names: set[str], gradients: bool = True, rtol: float = 1e-5) -> None:
    """Loss and metrics within 1e-5 relative, the gradient of each weight within 1e-4.

    Means of rewards may be small by chance, and are differences of log-probabilities that float32 rounds at 4e-6.

    Args:
        names: of the metrics that both must have; others that both have are compared too.
        rtol: of the loss.
    """
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=rtol)
    both = ours.metrics.keys() & theirs.metrics.keys()
    assert names <= both, names - both
    for name in both:
        np.testing.assert_allclose(ours.metrics[name], theirs.metrics[name], rtol=1e-5, atol=4e-6, err_msg=name)
    if not gradients:
        return
    assert ours.gradients.keys() == theirs.gradients.keys()
    whole = max(np.linalg.norm(gradient) for gradient in theirs.gradients.values())
    assert whole > 0, "no gradient, so nothing was compared"
    for name, want in theirs.gradients.items():
        got = ours.gradients[name].reshape(want.shape)
        assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want) + 1e-7 * whole, name


# ---- ftjax ----


@dataclasses.dataclass(frozen=True)
class Known(LossInputs):
    """Inputs of a loss whose log-probabilities were computed before: `[B, T]`, of all targets."""

    known: jax.Array | None = None
    auxiliary = 0.0

    def token_logprobs(self, wanted: jax.Array | None = None, **_: Any) -> TokenLogprobs:
        wanted = self.batch["weights"] if wanted is None else wanted
        return TokenLogprobs(jnp.where(wanted != 0, self.known, 0), None)


class Ours:
    """A model with its method on one device that has moved away from its start, and one batch of all rows.

    Args:
        objective: that of the data; others that take the same documents may be asked for.
        step: how far weights are moved, at random.
    """

    def __init__(self, folder: Path, rows: list[dict], objective: dict, method: dict, step: float = 0.0, **data: Any):
        path = folder / f"{objective['name']}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._values = {
            "model": {"path": str(folder), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
            "method": method, "objective": objective, "mesh": {"fsdp": 1}, "training": {"global_batch_size": 4},
            "data": {"train": str(path), "max_length": 128, **data},
        }  # fmt: skip
        config = Config.model_validate(self._values)
        self.setup = prepare(config, ONE)
        tokenizer = load_tokenizer(config.model)
        splits = load_splits(config.data, tokenizer, seed=0, encoding=encoding_of(config))
        self.split, _ = with_partners(config, splits, tokenizer)
        (self.batch,) = self.split.batches(len(rows), seed=0, shuffle=True, epochs=1)
        rng = np.random.default_rng(1)
        for name, value in self.setup.params.items():
            moved = np.asarray(value) + step * rng.normal(size=value.shape).astype(np.float32)
            self.setup.params[name] = jax.device_put(moved, value.sharding)

    def documents(self) -> Documents:
        """All documents, sorted."""
        found = []
        for row, segments in enumerate(self.batch["segment_ids"]):
            for number in range(1, segments.max() + 1):
                own = segments == number
                trained = (self.batch["weights"][row][own] > 0).tolist()  # of the token that follows
                found.append((tuple(self.batch["tokens"][row][own].tolist()), (0, *map(int, trained[:-1]))))
        return sorted(found)

    def tensors(self, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Values of trained parameters by the names of transformers or PEFT."""
        adapter, found = self.setup.config.method.name != "full", {}
        for path, spec in self.setup.model.trainable.items():
            for piece in spec.pieces():
                module, _, last = piece.name.rpartition(".")
                if adapter and spec.row.adapter:
                    name = f"base_model.model.{piece.name.removesuffix('.weight')}.default.weight"
                elif adapter:  # a module that is trained as a whole
                    name = f"base_model.model.{module}.modules_to_save.default.{last}"
                else:
                    name = piece.name
                found[name] = np.asarray(values[path][piece.index])
        return found

    def whole(self, **objective: Any) -> Found:
        """The loss as training computes it."""
        setup = self._with(objective)

        @partial(jax.value_and_grad, has_aux=True)
        def mean(params):
            totals, auxiliary = setup.loss_fn(params, setup.frozen, self.batch, setup.runtime.context(self.batch))
            return totals.loss / totals.weight + auxiliary, totals

        (_, totals), gradients = jax.jit(mean)(setup.params)
        return self._found(setup, [totals], gradients)

    def quick(self, **objective: Any) -> Found:
        """The same, from log-probabilities that are computed once."""
        setup, (logprobs, _, pull) = self._with(objective), self._logprobs

        def mean(known):
            totals = self._totals(setup, slice(None), known)
            return totals.loss / totals.weight, totals

        cotangent, totals = jax.jit(jax.grad(mean, has_aux=True))(logprobs)
        return self._found(setup, [totals], pull(cotangent))

    def by_rows(self, **objective: Any) -> Found:
        """Loss and metrics of an evaluation with a batch size of 1, from the same log-probabilities; no gradients."""
        setup, (logprobs, _, _) = self._with(objective), self._logprobs

        @jax.jit
        def rows(known):
            return [self._totals(setup, slice(at, at + 1), known[at : at + 1]) for at in range(len(known))]

        assert len(logprobs) > 1
        return self._found(setup, rows(logprobs), None)

    def _totals(self, setup: Setup, rows: slice, known: jax.Array) -> LossTotals:
        record, batch = objective_of(setup.config), {name: values[rows] for name, values in self.batch.items()}
        more = {"own_statistics": record.statistics}
        made = partial(Known, setup.model, setup.params, setup.frozen, batch, None, 0, setup.config)
        if record.reference(setup.config.objective):
            more["reference"] = made(known=self._logprobs[1][rows])
        return record.loss(made(known=known, **more))[0]

    @cached_property
    def _logprobs(self) -> tuple[jax.Array, jax.Array | None, Callable]:
        """Log-probabilities `[B, T]` of all targets for the model and for its reference, and the function from a gradient of
        the former to those of the weights."""
        setup, everything, ctx = self.setup, np.ones_like(self.batch["weights"]), self.setup.runtime.context(self.batch)

        def logprobs(model, params, frozen):
            return Forward(model, params, frozen, self.batch, ctx, 512).token_logprobs(everything).logprobs

        @jax.jit
        def pull(params, frozen, cotangent):
            return jax.vjp(lambda params: logprobs(setup.model, params, frozen), params)[1](cotangent)[0]

        own, before = jax.jit(partial(logprobs, setup.model))(setup.params, setup.frozen), setup.reference
        reference = None if before is None else jax.jit(partial(logprobs, before.model))({}, before.params(setup.frozen))
        return own, reference, partial(pull, setup.params, setup.frozen)

    def _with(self, objective: dict) -> Setup:
        found = {"name": self.setup.config.objective.name, **objective}
        return dataclasses.replace(self.setup, config=Config.model_validate({**self._values, "objective": found}))

    def _found(self, setup: Setup, totals: list[LossTotals], gradients: Mapping[str, Any] | None) -> Found:
        """As training and evaluation report it."""
        sums = Means()
        for one in totals:
            sums.add(jax.tree.map(float, {"loss": (one.loss, one.weight), **one.metrics}))
        means = sums.means()
        means |= objective_of(setup.config).derived(setup.config.objective, means)
        return Found(means.pop("loss"), means, {} if gradients is None else self.tensors(gradients))


# ---- TRL ----

KINDS = {
    "dpo": (DPOTrainer, DPOConfig), "cpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig),
    "kto": (KTOTrainer, KTOConfig), "reward": (RewardTrainer, RewardConfig),
}  # fmt: skip


class Theirs:
    """A trainer of TRL with the weights of `ours`, and its batch of the same rows.

    Args:
        kind: of the trainer.
        options: its settings that stay.
    """

    def __init__(self, folder: Path, rows: list[dict], ours: Ours, out: Path, kind: str, **options: Any):
        self.kind, method = kind, ours.setup.config.method
        (trainer, config), more = KINDS[kind], {}
        args = config(**{
            "output_dir": str(out), "per_device_train_batch_size": len(rows), "gradient_checkpointing": False, "bf16": False,
            "use_cpu": True, "report_to": "none", "max_length": 128, **options,
        })  # fmt: skip
        if kind == "reward":
            load = partial(AutoModelForSequenceClassification.from_pretrained, folder, dtype=torch.float32, num_labels=1)
        else:
            load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32)
        if method.name == "lora":
            task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
            more["peft_config"] = LoraConfig(
                r=method.r, lora_alpha=method.lora_alpha, target_modules=method.target_modules, task_type=task
            )
        elif ours.setup.reference is not None:
            more["ref_model"] = load()
        data, tokenizer = Dataset.from_list(rows), AutoTokenizer.from_pretrained(folder)
        self.trainer = trainer(load(), args=args, train_dataset=data, processing_class=tokenizer, **more)
        self.trained = {name: tensor for name, tensor in self.trainer.model.named_parameters() if tensor.requires_grad}
        values = ours.tensors(ours.setup.params)
        assert self.trained.keys() == values.keys(), self.trained.keys() ^ values.keys()
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.copy_(torch.tensor(values[name]).reshape(tensor.shape))
        self.batch = self.trainer.data_collator(list(self.trainer.train_dataset))

    def documents(self) -> Documents:
        """All documents, sorted."""
        batch, found = self.batch, []
        for prefix in ("", "KL_", "chosen_", "rejected_"):
            if f"{prefix}input_ids" in batch:
                trained = batch.get(f"{prefix}completion_mask", batch.get(f"{prefix}labels"))
                trained = batch[f"{prefix}attention_mask"] if trained is None else trained
                for ids, there, mask in zip(
                    batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"], trained, strict=True
                ):
                    length = int(there.sum())
                    found.append((tuple(ids[:length].tolist()), tuple((mask[:length] > 0).int().tolist())))
        return sorted(found)

    def __call__(self, **objective: Any) -> Found:
        """The loss with these settings; others are TRL's defaults."""
        trainer = self.trainer
        with pytest.MonkeyPatch.context() as patch:
            if self.kind == "dpo":
                types = objective.pop("loss_type", ["sigmoid"])
                objective = {"loss_weights": [1.0] * len(types), **objective, "loss_types": types}
            for name, value in objective.items():
                patch.setattr(trainer.args, name, value, raising=False)
                patch.setattr(trainer, name, value, raising=False)
            trainer.model.train()
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, dict(self.batch))
        loss.backward()
        stored = trainer._stored_metrics if hasattr(trainer, "_stored_metrics") else trainer._metrics
        metrics = {name: values[-1] for name, values in stored["train"].items() if isinstance(values, list)}
        stored["train"].clear()
        return Found(loss.item(), metrics, {name: tensor.grad.numpy().copy() for name, tensor in self.trained.items()})
