"""Finds the rows that a run trained on, and those that it split off (`data.validation_split`) and did not train on."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftjax.config import Config
from ftjax.config.code import setting
from ftjax.config.load import load_config
from ftjax.data.pipeline import PackedSplit, Split, load_splits
from ftjax.errors import UserError
from ftjax.evaluate.rows import Places, splits_off
from ftjax.evaluate.target import Target
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.objectives import encoding_of
from ftjax.train.record import RECORD
from ftjax.train.same_run import fingerprints

DECIDE = ("data.validation_split", "training.seed")  # with the data itself: which rows are split off


def held_out_places(found: Target) -> Places | None:
    """Return the places of the rows that a run, or training with this configuration, holds out; None if data is named.

    They are found as in training: with the run's own configuration and tokenizer, whatever this command changes.

    Raises UserError if the command asks for another split than the run's, or the data has changed since the run.
    """
    if not splits_off(found.config):
        return None
    config = trained_config(found, ("data.train", *DECIDE), "name data with --data FILE")
    train, validation = training_splits(config, load_tokenizer(config.model))
    assert validation is not None
    if changed := changed_documents(found, train, validation):
        raise UserError(f"{changed}, so the rows that it held out are not known; name other data with --data FILE")
    return validation.places()


def trained_config(found: Target, decide: Sequence[str], advice: str) -> Config:
    """Return the configuration that a run was trained with; without a run, the command's.

    Raises UserError if the command sets one of the keys in `decide` to another value; `advice` says what to do instead.
    """
    if found.run is None or not (found.run / "config.yaml").is_file():
        return found.config
    trained = load_config(found.run / "config.yaml", note=lambda text: None, asked=False)
    for key in decide:
        before, now = setting(trained, key), setting(found.config, key)
        if before != now:
            raise UserError(
                f"{key}: {now} is asked for, and the run has {before}: which rows it has not trained on is decided by its own "
                f"setting. Leave this one out, or {advice}"
            )
    return trained


def training_splits(config: Config, tokenizer: Any) -> tuple[Split, PackedSplit | None]:
    """Load a run's training and validation data. Raises UserError if it no longer exists."""
    return load_splits(config.data, tokenizer, seed=config.training.seed, encoding=encoding_of(config))


def changed_documents(found: Target, train: Split, validation: PackedSplit | None) -> str | None:
    """Return a message if these are not the training documents of the run; None if they are, or nothing is recorded."""
    saved = _record(found).get("documents", {}) if found.run is not None else {}
    for name, now in fingerprints(train, validation).items():
        if name in saved and saved[name].get("digest") != now["digest"]:
            return (
                f"{found.run}: {name}: the rows of {now['files']} (or the tokenizer, or its chat template) have changed since "
                "this run trained on them"
            )
    return None


def _record(found: Target) -> Mapping[str, Any]:
    try:
        value = json.loads((found.run / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run of an older version
        return {}
    return value if isinstance(value, dict) else {}
