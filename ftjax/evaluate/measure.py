"""Evaluation of one model on rows: answers or likelihoods, and their scores under a task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from ftjax.config import Config, EvaluateConfig
from ftjax.config.code import refuse_unasked
from ftjax.data.classes import TextLabels
from ftjax.data.encoder import Encoded, Unit
from ftjax.data.encoding import ANSWERS
from ftjax.data.example import Example
from ftjax.data.labels import Labels
from ftjax.data.pairs import Pairs
from ftjax.data.scored import Scored
from ftjax.data.unknown import refuse_unknown
from ftjax.errors import UserError
from ftjax.evaluate.likelihood import encode, encode_units, head_scores, likelihoods
from ftjax.evaluate.rows import Item
from ftjax.evaluate.statistic import Scores, means
from ftjax.evaluate.tasks.classify import classification, confusion_matrix, labels_of, with_label
from ftjax.evaluate.tasks.code import code
from ftjax.evaluate.tasks.heads import by_label, by_output, multi_label, regression
from ftjax.evaluate.tasks.loss import loss
from ftjax.evaluate.tasks.match import exact_match, f1, json_match, numeric_answer
from ftjax.evaluate.tasks.overlap import bleu, chrf, rouge
from ftjax.evaluate.tasks.own import load_metric, own
from ftjax.evaluate.tasks.preference import by_likelihood, by_score, fits
from ftjax.generate.session import Generator
from ftjax.models.classifier import MULTI, REGRESSION, SINGLE, classes_of, problem_of
from ftjax.objectives import head_of
from ftjax.objectives.classification import thresholds

TEXT_TASKS = {
    "exact_match": exact_match, "f1": f1, "numeric_answer": numeric_answer, "json_match": json_match, "bleu": bleu,
    "chrf": chrf, "rouge": rouge,
}  # fmt: skip
Progress = Callable[[int, int], None]  # (done, total)


@dataclass
class Measured:
    """Results of one model.

    Attributes:
        scores: scores of the task.
        predictions: the answers for each row; None if the task needs none.
        finished: why each answer ended (`stop` or `length`), in the order of `predictions`.
        extra: results other than metrics, such as a confusion matrix.
        pairs: float64 [N, 2], log-probabilities of the chosen and the rejected answer of each row, for the task `preference`;
            NaN for a row that was left out.
        seconds, tokens: duration, and tokens generated or scored.
    """

    scores: Scores
    predictions: list[list[str]] | None = None
    finished: list[list[str]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    pairs: np.ndarray | None = None
    seconds: float = 0.0
    tokens: int = 0


def check(config: Config, allow_code_execution: bool) -> None:
    """Raise UserError for whatever is known to be wrong before a model is loaded."""
    task = config.evaluate.task
    if task == "code" and not allow_code_execution:
        raise UserError(
            "evaluate.task code runs programs that the model wrote, in processes with limits on time and memory and without "
            "the network, but as this user; to do that, pass --allow-code-execution"
        )
    if task.endswith(".py"):
        refuse_unasked(config, "evaluate.task")
        load_metric(task)


def measure(generator: Generator, items: Sequence[Item], config: Config, progress: Progress | None = None) -> Measured:
    """Evaluate the task of `config.evaluate` on these rows. Raises UserError if a row does not fit the task or the model."""
    start, task = perf_counter(), config.evaluate.task
    labels = head_labels(generator, config)
    _fits(labels, config, task)
    if labels and task == "preference":
        measured = _scored_pairs(generator, items, config, progress)
    elif labels and task != "loss":
        measured = _head(generator, items, config, labels, progress)
    elif task == "preference":
        measured = _pairs(generator, items, config, progress)
    elif task == "loss":
        measured = _losses(generator, items, config, labels, progress)
    elif task == "classification":
        measured = _classes(generator, items, config, progress)
    else:
        measured = _answers(generator, items, config.evaluate, progress)
    measured.seconds = perf_counter() - start
    return measured


def head_labels(generator: Generator, config: Config) -> Labels | None:
    """Return the labels of a classification head, or None; a run knows names that its adapter does not store."""
    stored, known = classes_of(generator.model.config), head_of(config)
    if not stored:
        return None
    if known is None or not known.classes:
        return Labels(problem_of(generator.model.config), stored)
    if len(known.classes) != len(stored):
        raise UserError(f"objective.labels: {', '.join(known.classes)}: the model's head has {len(stored)} outputs")
    return Labels(known.problem_type, known.classes)


def _fits(labels: Labels | None, config: Config, task: str) -> None:
    """Raise UserError if the head is for another task, or the task needs a head and there is none."""
    if labels and task == "preference":
        if len(labels.names) != 1:
            raise UserError(f"evaluate.task preference: a reward model has one output, and this head has {len(labels.names)}")
    elif labels:
        own = "regression" if labels.problem_type == REGRESSION else "classification"
        if task not in ("loss", own):
            raise UserError(f"evaluate.task {task}: a {own} head generates no answers; the tasks are {own} and loss")
    elif task == "regression" or ((head := head_of(config)) and head.problem_type in (MULTI, REGRESSION)):
        raise UserError(f"evaluate.task {task}: several labels and numbers need a head, and this model has none")


def _head(generator: Generator, items: Sequence[Item], config: Config, labels: Labels, progress: Progress | None) -> Measured:
    """Evaluate a head: the class with the highest score, the labels above their thresholds, or numbers."""
    texts, vectors = _texts(generator, items, config, labels)
    names = list(labels.names)
    table = head_scores(generator, texts, len(names), config.evaluate.batch_size, _counting(progress, len(texts)))
    extra: dict[str, Any] = {"labels": names}
    if labels.problem_type == SINGLE:
        logprobs = table - np.logaddexp.reduce(table, axis=1, keepdims=True)
        names = labels_of(items, config.evaluate.model_copy(update={"labels": names}))
        chosen, scores = classification(items, logprobs, names)
        extra["confusion_matrix"] = confusion_matrix(items, chosen, names)
    elif labels.problem_type == MULTI:
        truth, probabilities, limits = vectors > 0.5, _sigmoid(table), thresholds(config.evaluate, labels.names)
        chosen, scores = multi_label(truth, probabilities, limits, names)
        extra["table"] = by_label(truth, probabilities >= limits, names)
    else:
        chosen, scores = regression(vectors, table)
        if len(names) > 1:
            extra["table"] = by_output(vectors, table, names)
    return Measured(scores, [[one] for one in chosen], extra=extra, tokens=sum(map(len, texts)))


def _texts(
    generator: Generator, items: Sequence[Item], config: Config, labels: Labels
) -> tuple[list[list[int]], np.ndarray | None]:
    """Return `(ids of each row, label vectors [N, labels])`; the latter is None if each row has one class."""
    documents = encode([item.example for item in items], generator.tokenizer, config.data, TextLabels(labels))
    _refuse_unknown(generator, [piece for pieces in documents for piece in pieces])
    for item, pieces in zip(items, documents, strict=True):
        if len(pieces) != 1:
            raise UserError(
                f"{item.where}: the text is longer than data.max_length {config.data.max_length}; raise it, or set "
                "data.truncation: right"
            )
    flat = [pieces[0] for pieces in documents]
    vectors = None if labels.single else np.stack([document.labels for document in flat]).astype(np.float64)
    return [document.tokens[:-1].tolist() for document in flat], vectors


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -scores))


def _losses(
    generator: Generator, items: Sequence[Item], config: Config, labels: Labels | None, progress: Progress | None
) -> Measured:
    if labels and not labels.single:
        texts, vectors = _texts(generator, items, config, labels)
        table = head_scores(generator, texts, len(labels.names), config.evaluate.batch_size, _counting(progress, len(texts)))
        errors = (table - vectors) ** 2
        if labels.problem_type == MULTI:
            errors = np.logaddexp(0, table) - table * vectors
        return Measured(means([{"loss": float(one)} for one in errors.mean(1)], shares=False), tokens=sum(map(len, texts)))
    encoding = TextLabels(labels) if labels else ANSWERS
    documents = encode([item.example for item in items], generator.tokenizer, config.data, encoding)
    flat = [piece for pieces in documents for piece in pieces]
    _refuse_unknown(generator, flat)
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
    _refuse_unknown(generator, [piece for pieces in documents for piece in pieces])
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


def _pairs(generator: Generator, items: Sequence[Item], config: Config, progress: Progress | None) -> Measured:
    """Compare the likelihoods of both answers of each row."""
    units = encode_units([item.example for item in items], generator.tokenizer, config.data, Pairs())
    flat, kept, extra = _fitting(generator, units)
    found = iter(likelihoods(generator, flat, config.evaluate.batch_size, _counting(progress, len(flat))))
    rows = [(next(found), next(found)) if there else None for there in kept]
    logps = np.array([[np.nan] * 2 if row is None else [-one.loss for one in row] for row in rows])
    return Measured(by_likelihood(rows), extra=extra, pairs=logps, tokens=sum(len(one.tokens) for one in flat))


def _scored_pairs(generator: Generator, items: Sequence[Item], config: Config, progress: Progress | None) -> Measured:
    """Compare a reward model's scores of both answers of each row."""
    units = encode_units([item.example for item in items], generator.tokenizer, config.data, Scored())
    flat, kept, extra = _fitting(generator, units)
    texts = [document.tokens[:-1].tolist() for document in flat]
    table = head_scores(generator, texts, 1, config.evaluate.batch_size, _counting(progress, len(texts)))[:, 0]
    found = iter(table.tolist())
    rows = [(next(found), next(found)) if there else None for there in kept]
    return Measured(by_score(rows), extra=extra, tokens=sum(map(len, texts)))


def _fitting(generator: Generator, units: Sequence[Unit]) -> tuple[list[Encoded], list[bool], dict[str, int]]:
    """Return the documents of the pairs that fit the context, which pairs these are, and a count of the others to report."""
    kept = [fits(unit, generator.context) for unit in units]
    flat = [document for unit, there in zip(units, kept, strict=True) if there for document in unit]
    _refuse_unknown(generator, flat)
    if not flat:
        raise UserError(f"evaluate: no pair fits the model's context of {generator.context} tokens")
    return flat, kept, {} if all(kept) else {"rows_longer_than_the_context": kept.count(False)}


def _refuse_unknown(generator: Generator, documents: Sequence[Encoded]) -> None:
    """Raise UserError, naming the row, if a token has no embedding."""
    for document in documents:
        refuse_unknown(document.tokens, generator.model.sizes.vocab, document.where, generator.tokenizer)


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
    """Return the prompt: the text, or the messages before the answer."""
    question = item.example.question(tokenizer)
    return list(question) if isinstance(question, tuple) else question


def _counting(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    return (lambda done: progress(done, total)) if progress else None
