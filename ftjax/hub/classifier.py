"""Presents a causal language model's files as those of a sequence classifier: without the old head, with a new one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import adapter_file, read_adapter_config
from ftjax.hub.source import TensorSource
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.models.classifier import HEAD, REGRESSION, SINGLE, classes_of, classifier_config, problem_of
from ftjax.models.composite import text_of
from ftjax.models.model import build_module
from ftjax.objectives import head_of

TASK = "SEQ_CLS"  # PEFT's name of the task
OLD = ("lm_head.weight", "embed_out.weight")
WEIGHT = f"{HEAD}.weight"


class WithHead:
    """A `TensorSource` with a new head, initialised as in transformers: normal with standard deviation `scale`."""

    def __init__(self, source: TensorSource, shape: tuple[int, int], scale: float, seed: int):
        self._source = source
        self._new = (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)

    def keys(self) -> Sequence[str]:
        return [*(name for name in self._source.keys() if name not in OLD), WEIGHT]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._new.shape if name == WEIGHT else self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._new.dtype if name == WEIGHT else self._source.dtype(name)

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        return self._new[tuple(index)].copy() if name == WEIGHT else self._source.read(name, index)


class InOrder:
    """A `TensorSource` of a classifier with reordered classes: the rows of its head in the order `order`."""

    def __init__(self, source: TensorSource, order: Sequence[int]):
        self._source, self._order = source, list(order)
        self.keys, self.shape, self.dtype = source.keys, source.shape, source.dtype

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        if name != WEIGHT:
            return self._source.read(name, index)
        return np.ascontiguousarray(self._source.read(name)[self._order][tuple(index)])


def with_head(
    hf_config: Mapping[str, Any], source: TensorSource, classes: Sequence[str], *, seed: int = 0,
    pad_token_id: int | None = None, problem_type: str | None = SINGLE,
) -> tuple[dict[str, Any], TensorSource]:  # fmt: skip
    """Return config.json and tensors of a base model as those of a classifier.

    A model that has these classes already keeps its head, with its rows in the order of `classes`.

    Args:
        problem_type: None: unknown.

    Raises UserError if the model is a classifier with other classes, or of another kind.
    """
    have, kind = classes_of(hf_config), hf_config.get("problem_type")
    if have and problem_type and (kind or (REGRESSION if len(have) == 1 else problem_type)) != problem_type:
        raise UserError(
            f"objective.problem_type: the model has a head for {problem_of(hf_config)} already, and {problem_type} is "
            "asked for; set problem_type to what it has, or start from the causal language model"
        )
    if have and problem_type == REGRESSION and len(have) == len(classes):  # the names of regression outputs do not matter
        have = tuple(classes)
    if have and set(have) != set(classes):
        raise UserError(
            f"objective.labels: the model is a classifier of {', '.join(have)} already, and the labels are "
            f"{', '.join(classes)}; map the labels of the data to those, or start from the causal language model"
        )
    if have:
        hf_config = {
            **classifier_config(hf_config, classes, pad_token_id, problem_type),
            "architectures": hf_config["architectures"],
        }
        order = [have.index(name) for name in classes]
        return hf_config, source if order == sorted(order) else InOrder(source, order)
    hf_config = classifier_config(hf_config, classes, pad_token_id, problem_type)
    embed = build_module(hf_config).sizes.embed
    return hf_config, WithHead(source, (len(classes), embed), text_of(hf_config).get("initializer_range") or 0.02, seed)


def objectives_hf_config(config: Config, hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return a base model's config.json as that of the classifier that a run trains, or unchanged if it trains none.

    Raises UserError if the objective has a head and its classes were neither configured nor found.
    """
    head = head_of(config)
    if head is None or classes_of(hf_config):
        return hf_config
    if head.classes is None:
        raise UserError("objective.head: its classes are not known without the data; name them in objective.labels")
    return classifier_config(hf_config, head.classes, problem_type=head.problem_type)


def with_objectives_head(
    config: Config, hf_config: dict[str, Any], source: TensorSource
) -> tuple[dict[str, Any], TensorSource]:
    """Return config.json and tensors with the head that the objective needs."""
    head = head_of(config)
    if head is None or head.classes is None:
        if classes_of(hf_config):
            raise UserError(
                f"{config.model.path} is a sequence classifier, and the objective {config.objective.name} trains the words of "
                "answers; write objective: {name: classification, head: true}"
            )
        return hf_config, source
    tokenizer = load_tokenizer(config.model)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return with_head(
        hf_config, source, head.classes, seed=config.training.seed, pad_token_id=pad, problem_type=head.problem_type
    )


def with_adapters_head(
    adapter: Path,
    hf_config: dict[str, Any],
    source: TensorSource,
    classes: Sequence[str] | None = None,
    problem_type: str | None = None,
) -> tuple[dict[str, Any], TensorSource]:
    """Return config.json and tensors as an adapter folder needs them: a classifier if PEFT's task_type says so.

    Args:
        classes: their names, which adapter folders lack; None: LABEL_0 and so on, as in transformers.
        problem_type: the meaning of the scores, which adapter folders lack too.
    """
    if read_adapter_config(adapter).get("task_type") != TASK:
        return hf_config, source
    stored, name = adapter_file(adapter), f"base_model.model.{WEIGHT}"
    if name not in stored.keys():
        raise UserError(f"{adapter}: its task_type is {TASK}, but its file holds no {name}")
    count = stored.shape(name)[0]
    if classes_of(hf_config):
        classes = classes_of(hf_config)
    names = classes or [f"LABEL_{number}" for number in range(count)]
    return with_head(hf_config, source, names, problem_type=hf_config.get("problem_type") or problem_type)
