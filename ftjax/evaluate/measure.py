"""One model on some rows: answers or likelihoods, and the scores that the task gives them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from ftjax.config import Config, EvaluateConfig
from ftjax.data.example import Example
from ftjax.errors import UserError
from ftjax.evaluate.likelihood import class_logprobs, encode, likelihoods
from ftjax.evaluate.rows import Item
from ftjax.evaluate.statistic import Scores
from ftjax.evaluate.tasks.classify import classification, confusion_matrix, labels_of, with_label
from ftjax.evaluate.tasks.code import code
from ftjax.evaluate.tasks.loss import loss
from ftjax.evaluate.tasks.match import exact_match, f1, json_match, numeric_answer
from ftjax.evaluate.tasks.overlap import bleu, chrf, rouge
from ftjax.evaluate.tasks.own import load_metric, own
from ftjax.generate.session import Generator
from ftjax.models.classifier import classes_of

TEXT_TASKS = {
    "exact_match": exact_match, "f1": f1, "numeric_answer": numeric_answer, "json_match": json_match, "bleu": bleu,
    "chrf": chrf, "rouge": rouge,
}  # fmt: skip
Progress = Callable[[int, int], None]  # (done, of how many)


@dataclass
class Measured:
    """What one model did.

    Attributes:
        scores: of the task.
        predictions: the answers of each row; None where the task asks for none.
        finished: why each answer ended (`stop` or `length`), beside `predictions`.
        extra: results that are no metrics, such as a confusion matrix.
        seconds, tokens: time, and tokens that were written or scored.
    """

    scores: Scores
    predictions: list[list[str]] | None = None
    finished: list[list[str]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0


def check(config: EvaluateConfig, allow_code_execution: bool) -> None:
    """What can be known before a model is loaded. Raises UserError for it."""
    if config.task == "code" and not allow_code_execution:
        raise UserError(
            "evaluate.task code runs programs that the model wrote, in processes with limits on time and memory and without "
            "the network, but as this user; say --allow-code-execution to do that"
        )
    if config.task.endswith(".py"):
        load_metric(config.task)


def measure(generator: Generator, items: Sequence[Item], config: Config, progress: Progress | None = None) -> Measured:
    """The task of `config.evaluate` on these rows. Raises UserError where a row does not fit the task or the model."""
    start, task = perf_counter(), config.evaluate.task
    classes = head_classes(generator, config)
    if classes and task not in ("loss", "classification"):
        raise UserError(f"evaluate.task {task}: a classification head writes no answers; the tasks are classification and loss")
    if classes and task == "classification":
        measured = _head(generator, items, config, classes, progress)
    elif task == "loss":
        measured = _losses(generator, items, config, progress)
    elif task == "classification":
        measured = _classes(generator, items, config, progress)
    else:
        measured = _answers(generator, items, config.evaluate, progress)
    measured.seconds = perf_counter() - start
    return measured


def head_classes(generator: Generator, config: Config) -> tuple[str, ...]:
    """Of a classification head, by number; empty where there is none. A run knows the names that its adapter does not hold."""
    stored = classes_of(generator.model.config)
    return tuple(config.objective.classes) if stored and config.objective.classes else stored


def _head(
    generator: Generator, items: Sequence[Item], config: Config, classes: Sequence[str], progress: Progress | None
) -> Measured:
    """The class with the highest score."""
    documents = encode([item.example for item in items], generator.tokenizer, config.data, classes)
    for item, pieces in zip(items, documents, strict=True):
        if len(pieces) != 1:
            raise UserError(
                f"{item.where}: the text is longer than data.max_length {config.data.max_length}; raise it, or set "
                "data.truncation: right"
            )
    texts = [pieces[0].tokens[:-1].tolist() for pieces in documents]
    table = class_logprobs(generator, texts, len(classes), config.evaluate.batch_size, _counting(progress, len(texts)))
    labels = labels_of(items, config.evaluate.model_copy(update={"labels": list(classes)}))
    chosen, scores = classification(items, table, labels)
    extra = {"labels": labels, "confusion_matrix": confusion_matrix(items, chosen, labels)}
    return Measured(scores, [[one] for one in chosen], extra=extra, tokens=sum(map(len, texts)))


def _losses(generator: Generator, items: Sequence[Item], config: Config, progress: Progress | None) -> Measured:
    documents = encode(
        [item.example for item in items], generator.tokenizer, config.data, head_classes(generator, config) or None
    )
    flat = [piece for pieces in documents for piece in pieces]
    if not flat:
        raise UserError("evaluate: no row has a trained token within data.max_length")
    found = iter(likelihoods(generator, flat, config.evaluate.batch_size, _counting(progress, len(flat))))
    scores = loss([[next(found) for _ in pieces] for pieces in documents])
    left_out = sum(not pieces for pieces in documents)
    extra = {"rows_without_a_trained_token": left_out} if left_out else {}
    return Measured(scores, extra=extra, tokens=sum(len(piece.tokens) for piece in flat))


def _classes(generator: Generator, items: Sequence[Item], config: Config, progress: Progress | None) -> Measured:
    labels = labels_of(items, config.evaluate)
    candidates: list[Example] = [with_label(item, label) for item in items for label in labels]
    documents = encode(candidates, generator.tokenizer, config.data)
    for candidate, pieces in zip(candidates, documents, strict=True):
        if len(pieces) != 1:
            raise UserError(
                f"{candidate.where}: the row is longer than data.max_length {config.data.max_length}, so that its classes "
                "cannot be compared; raise it, or set data.truncation: left"
            )
    flat = [pieces[0] for pieces in documents]
    found = likelihoods(generator, flat, config.evaluate.batch_size, _counting(progress, len(flat)))
    table = -np.array([one.loss for one in found]).reshape(len(items), len(labels))
    chosen, scores = classification(items, table, labels)
    extra = {"labels": labels, "confusion_matrix": confusion_matrix(items, chosen, labels)}
    return Measured(scores, [[one] for one in chosen], extra=extra, tokens=sum(len(piece.tokens) for piece in flat))


def _answers(generator: Generator, items: Sequence[Item], config: EvaluateConfig, progress: Progress | None) -> Measured:
    tries = config.num_samples
    total = len(items) * tries
    shown = (lambda done, tokens: progress(done, total)) if progress else None
    prompts = [_prompt(generator, item) for item in items]
    found = generator.generate(
        [prompt for prompt in prompts for _ in range(tries)], max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
        repetition_penalty=config.repetition_penalty, stop=config.stop, seed=config.seed, batch_size=config.batch_size,
        progress=shown,
    )  # fmt: skip
    texts = [[one.text for one in found[n * tries : (n + 1) * tries]] for n in range(len(items))]
    finished = [[one.finish_reason for one in found[n * tries : (n + 1) * tries]] for n in range(len(items))]
    first = [several[0] for several in texts]
    if config.task == "code":
        scores = code(items, texts, config)
    elif config.task.endswith(".py"):
        scores = own(items, first, load_metric(config.task), [prompt_text(item, generator.tokenizer) for item in items])
    else:
        scores = TEXT_TASKS[config.task](items, first, config)
    return Measured(scores, texts, finished, tokens=sum(len(one.tokens) for one in found))


def _prompt(generator: Generator, item: Item) -> list[int]:
    try:
        return generator.encode(item.example)
    except UserError as error:
        raise UserError(f"{item.where}: {error}") from None


def prompt_text(item: Item, tokenizer: Any) -> Any:
    """What was asked: the text, or the messages before the answer."""
    question = item.example.question(tokenizer)
    return list(question) if isinstance(question, tuple) else question


def _counting(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    return (lambda done: progress(done, total)) if progress else None
