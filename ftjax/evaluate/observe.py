"""Evaluation during training, besides the loss: answers to a few fixed prompts, and the metric of a task."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ftjax.config.load import print_note
from ftjax.data.encoder import Encoded
from ftjax.data.pipeline import PackedSplit
from ftjax.distributed.agree import digest
from ftjax.errors import UserError
from ftjax.evaluate.fit import misfits, named_classes
from ftjax.evaluate.measure import check, measure
from ftjax.evaluate.rows import Item, read_items, splits_off
from ftjax.generate.finite import NotFinite
from ftjax.generate.session import Generator
from ftjax.generate.text import TextStream
from ftjax.objectives import encoding_of, head_of
from ftjax.train.observer import Observation
from ftjax.train.setup import Setup

START = 16  # tokens of a text without a prompt that the model continues


def make_observer(setup: Setup, tokenizer: Any, validation: PackedSplit | None) -> "Observer | None":
    """Build the observer for `ftjax.train.run.train`; None if the configuration asks for nothing.

    Raises UserError, before training starts, if rows or prompts cannot be used.
    """
    settings = setup.config.evaluate
    head, answers = head_of(setup.config) is not None, encoding_of(setup.config).imitated
    if head and settings.training_prompts:
        raise UserError("evaluate.training_prompts: a classification head generates no answers; use evaluate.training_rows")
    # The first document of a row: the chosen answer of a pair.
    first = validation.first(settings.training_examples) if validation and not head and answers else []
    documents = [unit[0] for unit, _ in first]
    if not documents and not settings.training_prompts and not settings.training_rows:
        return None
    return Observer(setup, tokenizer, documents, validation)


class Observer:
    """Generates answers and evaluates a task with the current parameters."""

    def __init__(self, setup: Setup, tokenizer: Any, documents: list[Encoded], validation: PackedSplit | None):
        self.config, self.settings = setup.config, setup.config.evaluate
        self.generator = Generator.of(
            setup.model, {}, tokenizer, mesh=setup.mesh, dtype=setup.runtime.dtype, source=setup.source
        )  # fmt: skip
        self.names: list[str] = []  # of the metrics, once they are computed
        _, self.generator.special_tokens_in_text, self.generator.fold_system = self.config.data.reading
        self.prompts: list[list[int]] = []
        self.shown: list[dict[str, str]] = []
        for text in self.settings.training_prompts:
            self.prompts.append(self.generator.encode(text, len(self.prompts)))
            self.shown.append({"prompt": text})
        for document in documents:
            prompt, answer = _divided(document)
            if len(prompt) < self.generator.context:
                self.prompts.append(prompt)
                self.shown.append({"prompt": self._text(prompt), "reference": self._answer(prompt, answer)})
        self.items = self._rows(validation) if self.settings.training_rows else []

    def _rows(self, validation: PackedSplit | None) -> list[Item]:
        """Return the rows of the task. Prints a warning, or raises UserError, if its metrics do not suit their references."""
        if self.settings.task == "code":
            raise UserError("evaluate.training_rows: the task code does not run while training; use ftjax evaluate later")
        check(self.config, False)
        only = validation.places() if validation is not None and splits_off(self.config) else None
        items, _ = read_items(self.config, self.settings.training_rows, only)
        for text in misfits(self.settings.task, items, named_classes(self.config)):
            if jax.process_index() == 0:
                print_note(f"warning: {text}")
        return items

    @property
    def facts(self) -> dict[str, Any]:
        """Digests of prompts and rows, which must be equal on all processes of a run."""
        return {"digest of the prompts": digest(self.prompts), "digest of the rows": digest(self.items)}

    def _text(self, tokens: list[int]) -> str:
        return self.generator.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _answer(self, prompt: list[int], tokens: list[int]) -> str:
        """Decode the reference as a generated answer: without special tokens, its end, and what the template adds after it."""
        ends = [at for at, token in enumerate(tokens) if token in self.generator.ends]
        if ends and not self._text(tokens[ends[-1] + 1 :]).strip():
            tokens = tokens[: ends[-1]]
        stream = TextStream(self.generator.tokenizer, prompt)
        return stream.feed(tokens) + stream.finish()

    def __call__(self, params: Mapping[str, jax.Array]) -> Observation:
        """Evaluate the model. Args: params: all parameters, trained and frozen."""
        generator = self.generator
        generator.params = dict(params)
        try:
            most = self.settings.training_max_new_tokens
            answers = generator.generate(self.prompts, max_new_tokens=most) if self.prompts else []
            texts = [{**shown, "text": answer.text} for shown, answer in zip(self.shown, answers, strict=True)]
            metrics = measure(generator, self.items, self.config).scores.values() if self.items else {}
            self.names = list(metrics)
        except NotFinite as error:  # training continues: updates that are not finite are skipped and counted
            if jax.process_index() == 0:
                print_note(f"no metrics for the answers: {error}")
            texts, metrics = [], dict.fromkeys(self.names, math.nan)
        finally:
            generator.params = {}  # the next update donates these arrays
        # `eval/loss` and the like are taken by the loss on the validation set.
        prefix = "eval/task_" if self.settings.task == "loss" else "eval/"
        return Observation({f"{prefix}{name}": value for name, value in metrics.items()}, texts)


def _divided(document: Encoded) -> tuple[list[int], list[int]]:
    """Split into `(prompt, answer)` at the first trained token, or early in a text that is trained as a whole."""
    tokens = document.tokens.tolist()
    first = int(np.flatnonzero(document.weights[1:])[0]) + 1
    if first == 1:
        first = min(START, max(1, len(tokens) // 2))
    return tokens[:first], tokens[first:]
