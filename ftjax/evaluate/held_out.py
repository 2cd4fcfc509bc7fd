"""The held-out rows of a run: those that it split off its training data (`data.validation_split`) and did not train on."""

import json
from collections.abc import Mapping
from typing import Any

from ftjax.config import Config
from ftjax.config.code import setting
from ftjax.config.load import load_config
from ftjax.data.pipeline import load_splits
from ftjax.errors import UserError
from ftjax.evaluate.rows import Places, splits_off
from ftjax.evaluate.target import Target
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.objectives import encoding_of
from ftjax.train.record import RECORD
from ftjax.train.same_run import fingerprints

DECIDE = ("data.train", "data.validation_split", "training.seed")  # which rows are split off


def held_out_places(found: Target) -> Places | None:
    """Return the places of the rows that a run, or training with this configuration, holds out; None if data is named.

    They are found as in training: with the run's own configuration and tokenizer, whatever this command changes.

    Raises UserError if the command asks for another split than the run's, or the data has changed since the run.
    """
    config = found.config
    if not splits_off(config):
        return None
    record: Mapping[str, Any] = {}
    if found.run is not None and (found.run / "config.yaml").is_file():
        trained = load_config(found.run / "config.yaml", note=lambda text: None, asked=False)
        _refuse_another(trained, config)
        config, record = trained, _record(found)
    train, validation = load_splits(
        config.data, load_tokenizer(config.model), seed=config.training.seed, encoding=encoding_of(config)
    )
    assert validation is not None
    saved, now = record.get("documents", {}), fingerprints(train, validation)
    for name in saved:
        if saved[name].get("digest") != now.get(name, {}).get("digest"):
            raise UserError(
                f"{found.run}: data.validation_split: the rows of {now[name]['files']} (or the tokenizer, or its chat "
                "template) have changed since this run trained on them, so the rows that it held out "
                "are not known; name other data with --data FILE"
            )
    return validation.places()


def _refuse_another(trained: Config, asked: Config) -> None:
    for key in DECIDE:
        before, now = setting(trained, key), setting(asked, key)
        if before != now:
            raise UserError(
                f"{key}: {now} is asked for, and the run has {before}: which rows it has not trained on is decided by its own "
                "setting. Leave this one out, or name data with --data FILE"
            )


def _record(found: Target) -> Mapping[str, Any]:
    try:
        value = json.loads((found.run / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run of an older version
        return {}
    return value if isinstance(value, dict) else {}
