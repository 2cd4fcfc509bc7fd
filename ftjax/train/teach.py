"""`ftjax teach`: write a teacher's predictions for the data of a run, once, so that runs learn from it without it.

`FOLDER/train.arrow` and, with validation data, `FOLDER/validation.arrow` (`ftjax.data.predictions`). A file that is there
already, for the same documents, teacher and settings, is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import Config
from ftjax.config.distill import DistillConfig
from ftjax.data.pipeline import PackedSplit, Split, load_splits
from ftjax.data.predictions import MOST, Predictions, facts_of, new_predictions
from ftjax.distributed import store
from ftjax.errors import UserError
from ftjax.hub.load import positions_of
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.vocabulary import embeddings_of
from ftjax.long_steps import counted
from ftjax.mesh import devices_or_all, make_mesh, replicated
from ftjax.models.composite import text_of
from ftjax.models.nn.attention import choose
from ftjax.objectives import encoding_of
from ftjax.objectives.distill import predictions
from ftjax.objectives.objective import Forward
from ftjax.train.auto_mesh import choose_mesh
from ftjax.train.layout import BatchLayout
from ftjax.train.progress import say
from ftjax.train.remat import device_memory
from ftjax.train.step import Runtime
from ftjax.train.teacher import Teacher, open_teacher, refuse_tokenizer_of

NAMES = ("train", "validation")


class Rows(NamedTuple):
    """Predictions for the trained tokens of some documents, in order; see `ftjax.data.predictions`."""

    document: np.ndarray
    position: np.ndarray
    token: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    rest: np.ndarray


def teach(config: Config, devices: Sequence[jax.Device] | None = None) -> list[Path]:
    """Write the predictions of the teacher of a configuration; return the files.

    Args:
        devices: devices to use; None uses all.

    Raises UserError for anything wrong in the configuration, the teacher or the data.
    """
    section = config.objective
    if not isinstance(section, DistillConfig) or section.teacher_model_name_or_path is None or section.teacher_logprobs is None:
        raise UserError(
            "ftjax teach writes the predictions of objective.teacher_model_name_or_path to objective.teacher_logprobs, a "
            f"folder, for objective.name: distill; found objective {section.name}. Set the three of them"
        )
    given = section.teacher_model_name_or_path, section.teacher_model_revision
    tokenizer = load_tokenizer(config.model)
    refuse_tokenizer_of(given, config.model, tokenizer)
    teacher = open_teacher(*given)
    vocabulary = min(embeddings_of(config), text_of(teacher.model.config)["vocab_size"])
    if section.loss_top_k > vocabulary or vocabulary > MOST:
        raise UserError(
            f"objective.loss_top_k: {section.loss_top_k} of the {vocabulary:,} tokens of the vocabulary; choose fewer"
        )
    splits = load_splits(
        config.data, tokenizer, seed=config.training.seed, encoding=encoding_of(config),
        positions=positions_of(config.model.path, config.model.revision),
    )  # fmt: skip
    facts = {"teacher": teacher.place.facts(), "temperature": section.temperature, "vocabulary": vocabulary}
    return write(config, splits, facts, lambda: TeacherRows(config, teacher, vocabulary, devices))


def write(
    config: Config, splits: Sequence[Split | None], facts: dict[str, Any],
    make: Callable[[], Callable[[PackedSplit], Iterator[Rows]]],
) -> list[Path]:  # fmt: skip
    """Write the predictions for each data set that lacks them; return all files.

    Args:
        facts: what determines them, besides the documents.
        make: called if any are missing; returns the function that computes them.
    """
    rows_of, paths = None, []
    for name, split in zip(NAMES, splits, strict=True):
        if split is None:
            continue
        path = path_of(config, name)
        own = {**facts, "documents": split.fingerprint()["digest"], "top_k": config.objective.loss_top_k}
        paths.append(path)
        there = facts_of(path)
        if all(store.gathered("predictions", there is not None and there.items() >= own.items())):
            say(f"{path} is there already, for the same documents and teacher")
            continue
        rows_of = rows_of or make()
        say(f"{path}: predictions for {int(split.documents.trained[split.chosen].sum()):,} tokens")
        if jax.process_index():
            for _ in rows_of(split):  # computed by all processes, written by the first
                pass
            continue
        with new_predictions(path, own) as writer:
            for rows in rows_of(split):
                writer.add(*rows)
    return paths


def path_of(config: Config, name: str) -> Path:
    """Return the file for a data set, `train` or `validation`."""
    return Path(config.objective.teacher_logprobs).expanduser() / f"{name}.arrow"


def with_predictions(config: Config, splits: Sequence[Split | None]) -> tuple[Split | None, ...]:
    """Return the data sets with the predictions that `ftjax teach` has written, if the objective learns from them.

    Raises UserError if they are missing, or are for other documents or settings.
    """
    section = config.objective
    if not isinstance(section, DistillConfig) or section.teacher_logprobs is None:
        return tuple(splits)
    return tuple(
        None if split is None else replace(split, predictions=_opened(config, name, split))
        for name, split in zip(NAMES, splits, strict=True)
    )


def _opened(config: Config, name: str, split: PackedSplit) -> Predictions:
    section, path = config.objective, path_of(config, name)
    found = facts_of(path)
    again = "run `ftjax teach` with this configuration"
    if found is None:
        raise UserError(f"{path}: there are no predictions of a teacher for data.{name}; {again} first")
    if found["documents"] != split.fingerprint()["digest"]:
        raise UserError(
            f"{path}: these predictions are for other documents than those of data.{name}: rows, tokenizer, chat template or "
            f"data.max_length have changed since; {again} again"
        )
    if found["temperature"] != section.temperature:
        raise UserError(
            f"objective.temperature: {section.temperature}, and {path} was written at {found['temperature']}; set that, or "
            f"{again}"
        )
    if found["top_k"] < section.loss_top_k:
        raise UserError(f"objective.loss_top_k: {section.loss_top_k}, and {path} has {found['top_k']}; set that, or {again}")
    return Predictions(path, split.documents, split.chosen, section.loss_top_k)


class TeacherRows:
    """Runs a teacher over documents."""

    def __init__(self, config: Config, teacher: Teacher, vocabulary: int, devices: Sequence[jax.Device] | None):
        self._config, self._teacher = config, teacher
        devices = devices_or_all(devices)
        mesh = config.mesh
        if mesh.auto:
            mesh, _ = choose_mesh(config, teacher.model, devices, device_memory(devices))
        self.mesh = make_mesh(mesh, devices)
        attention = choose(config.model.attention, self.mesh.devices.flat[0], self.mesh.size)
        self._runtime = Runtime(jnp.dtype(config.model.compute_dtype), attention)
        self._params = teacher.params(teacher.load(self.mesh, config.model.dtype))
        options = config.training
        self._rows = options.eval_batch_size or options.global_batch_size // options.gradient_accumulation_steps
        self._layout = BatchLayout(self.mesh, self._rows)
        chunk = config.objective.loss_chunk * self._layout.shards
        self._predict = jax.jit(partial(self._of_batch, chunk, vocabulary), out_shardings=replicated(self.mesh))

    def __call__(self, split: PackedSplit) -> Iterator[Rows]:
        """Yield the predictions for all chosen documents of a data set, batch by batch."""
        every = replace(split, weights=(1.0,) * len(split.weights))
        batches = every.batches(
            self._rows, seed=0, shuffle=False, epochs=1, rows=self._layout.own, width_multiple=self._layout.length_parts
        )
        plan = batches.plan(0)
        with jax.set_mesh(self.mesh):
            steps = counted("computing the teacher's predictions", batches, -(-len(plan) // self._rows), "batches")
            for start, batch in zip(range(0, len(plan), self._rows), steps, strict=True):
                documents, _ = plan.take(np.arange(start, start + self._rows))
                places = [np.flatnonzero(split.documents.document(one).weights[1:]) + 1 for one in documents]
                trained, tokens, *found = map(np.asarray, self._predict(self._params, self._layout.arrays(batch)))
                of = np.repeat(documents, list(map(len, places))).astype(np.int32)
                if not np.isfinite(found[1][trained]).all():
                    raise UserError(f"{self._teacher.place.name}: predictions are not finite; are the teacher's weights?")
                yield Rows(of, np.concatenate(places).astype(np.int32), *(x[trained] for x in (tokens, *found)))

    def _of_batch(self, chunk: int, vocabulary: int, params: dict, batch: dict) -> tuple[jax.Array, ...]:
        section = self._config.objective
        forward = Forward(self._teacher.model, {}, params, batch, self._runtime.context(batch), chunk)
        found = predictions(forward, section.loss_top_k, section.temperature, vocabulary)
        return batch["weights"] != 0, batch["targets"], *found
