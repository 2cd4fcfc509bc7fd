"""Material of a check: safety prompts, everyday prompts, passages to read, rows of the training data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.config import CheckConfig
from ftjax.config.data import SourceConfig
from ftjax.data.encoder import Encoded
from ftjax.data.example import Example
from ftjax.data.pipeline import Split
from ftjax.data.read import read_rows
from ftjax.errors import UserError
from ftjax.evaluate.check.counterfactual import Varied
from ftjax.evaluate.check.counterfactual import gather as gather_varied
from ftjax.evaluate.check.general import PROMPTS, TEXTS

LABELS = ("safe", "unsafe")
BUILT_IN = "built in"


@dataclass(frozen=True)
class Asked:
    """One prompt; with `label` (safe, unsafe) if it tests for refusal, and `language` if the file states it."""

    text: str
    where: str
    label: str | None = None
    kind: str | None = None  # the column `type`, by which refusals are counted separately
    language: str | None = None


@dataclass(frozen=True)
class Piece:
    """Tokens of one row of the data: `prompt`, and the trained tokens that follow it."""

    prompt: list[int]
    following: list[int]
    where: str


@dataclass(frozen=True)
class Material:
    """Material of one check, except the pieces, which need a tokenizer (`pieces`)."""

    safety: tuple[Asked, ...]
    general: tuple[Asked, ...]
    texts: tuple[Example, ...]
    sources: dict[str, str]  # where each comes from
    varied: tuple[Varied, ...] = ()  # counterfactual prompts


def gather(settings: CheckConfig) -> Material:
    """Read the material. Raises UserError, with file and line, for what is missing or wrong."""
    safety = _prompts(settings.prompts, settings.limit, labelled=True) if settings.prompts else ()
    general = tuple(Asked(text, f"everyday prompt {n}") for n, text in enumerate(PROMPTS, 1))
    if settings.general_prompts:
        general = _prompts(settings.general_prompts, settings.limit, labelled=False)
    texts = _texts(settings.general_text)
    names = {"general_prompts": settings.general_prompts or BUILT_IN, "general_text": settings.general_text or BUILT_IN}
    given = {name: value for name in ("prompts", "counterfactual") if (value := getattr(settings, name))}
    varied = gather_varied(settings.counterfactual) if settings.counterfactual else ()
    return Material(safety, general, texts, given | names, varied)


def spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    """Return at most `limit` items, evenly spaced."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def _prompts(path: str, limit: int | None, *, labelled: bool) -> tuple[Asked, ...]:
    found: dict[str | None, list[Asked]] = {}
    for row in read_rows(SourceConfig(path=path, split="test")):
        text, label = row.values.get("prompt"), row.values.get("label")
        if not isinstance(text, str) or not text.strip():
            columns = ", ".join(map(str, row.values))
            raise UserError(f"{row.where}: expected a text in the column prompt; the row has {columns}")
        if labelled and label not in LABELS:
            raise UserError(f"{row.where}: label {label!r}; expected safe or unsafe")
        label = label if labelled else None
        found.setdefault(label, []).append(Asked(text, row.where, label, row.values.get("type"), row.values.get("language")))
    if labelled and (missing := [label for label in LABELS if label not in found]):
        raise UserError(f"{path}: no prompt has the label {missing[0]}; a check of refusals needs safe and unsafe ones")
    return tuple(one for several in found.values() for one in spread(several, limit))


def _texts(path: str | None) -> tuple[Example, ...]:
    if path is None:
        return tuple(Example(f"passage {n}", text=text) for n, text in enumerate(TEXTS, 1))
    if Path(path).suffix.lower() not in (".txt", ".md"):
        found = []
        for row in read_rows(SourceConfig(path=path, split="test")):
            text = row.values.get("text")
            if not isinstance(text, str) or not text.strip():
                raise UserError(
                    f"{row.where}: expected a text in the column text; the row has {', '.join(map(str, row.values))}"
                )
            found.append(Example(row.where, text=text))
        return tuple(found)
    try:
        whole = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"check.general_text: {path}: cannot be read as UTF-8 text: {error}") from None
    parts = [part.strip() for part in whole.replace("\r\n", "\n").split("\n\n") if part.strip()]
    if not parts:
        raise UserError(f"check.general_text: {path}: the file is empty")
    return tuple(Example(f"{path}, paragraph {n}", text=part) for n, part in enumerate(parts, 1))


def pieces(split: Split, settings: CheckConfig, context: int, *, seed: int | None) -> tuple[list[Piece], int]:
    """Return `(rows to continue, number of rows too short for it)`, in the order of training (`seed`), or in that of the data.

    The prompt is `verbatim_prefix` tokens long, or ends at the first trained token if that comes later.
    """
    found, short = [], 0
    batches = split.batches(1, seed=seed or 0, shuffle=seed is not None, epochs=1)
    for batch in batches:
        for document in _documents(batch):
            trained = np.flatnonzero(document.weights > 0)
            start = max(int(trained[0]) if len(trained) else len(document.tokens), settings.verbatim_prefix)
            stop = start + settings.verbatim_length
            if stop > min(len(document.tokens), context) or not (document.weights[start:stop] > 0).all():
                short += 1
                continue
            ids = document.tokens.tolist()
            found.append(Piece(ids[:start], ids[start:stop], document.where))
            if len(found) == settings.verbatim_rows:
                return found, short
    return found, short


def _documents(batch: dict[str, np.ndarray]) -> list[Encoded]:
    """Split a packed row `[1, T]` into its documents, with the weights moved back to their own tokens."""
    tokens, weights, segments = (batch[name][0] for name in ("tokens", "weights", "segment_ids"))
    found = []
    for segment in range(1, int(segments.max(initial=0)) + 1):
        own = segments == segment
        mine = np.concatenate([np.zeros(1, np.float32), weights[own][:-1]])
        found.append(Encoded(tokens[own], mine, f"document {segment}"))
    return found
