"""Checks whether a model is the one that an adapter was trained on: by a digest of its weights, else by its name.

The digest samples a few values of every matrix, so it is fast and does not depend on how a checkpoint is sharded into
files. It is in a separate file beside `adapter_config.json`, because older versions of PEFT refuse unknown keys there.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import xxhash

from ftjax.config.load import print_note
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import CONFIG, read_adapter_config
from ftjax.hub.fetch import HUB
from ftjax.hub.load import open_model
from ftjax.hub.public import public_name
from ftjax.hub.source import TensorSource

FILE = "base_model.json"
NAMES_BASE = ("base_model_name_or_path", "model_name", "tokenizer_name_or_path")  # keys of adapter_config.json
VALUES = 16  # values sampled per matrix
ROUNDED = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}  # one digest each, for base models stored in that dtype


def weights_digest(source: TensorSource) -> dict[str, str]:
    """Return digests of a checkpoint's matrices, rounded to each of two dtypes."""
    digests = {name: xxhash.xxh3_128() for name in ROUNDED}
    for name in sorted(source.keys()):
        shape = source.shape(name)
        if len(shape) == 2:
            row = source.read(name, (slice(shape[0] // 2, shape[0] // 2 + 1),))[0]
            values = row[:: max(1, shape[1] // VALUES)].astype(np.float32)
            for rounded, digest in digests.items():
                with np.errstate(over="ignore"):
                    digest.update(f"{name}\0".encode() + values.astype(ROUNDED[rounded]).tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def write_base(folder: Path, base: Path) -> None:
    """Write the digest into an adapter's folder, and remember the model's path on this machine.

    Args:
        base: the base model's folder or file.
    """
    digests = weights_digest(open_model(base)[1])
    (folder / FILE).write_text(json.dumps({"weights": digests}, indent=2) + "\n")
    try:
        file = _remembering(digests)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(base.absolute()), encoding="utf-8")
    except OSError:  # the user then has to name the base
        pass


def publish_base(folder: Path) -> None:
    """Replace the base model's path in an adapter's configuration by its name; older versions wrote the path.

    If the model is on this machine and the folder has no digest of it, the digest is written, so that the name still resolves.
    """
    saved = read_adapter_config(folder)
    named = {key: saved[key] for key in NAMES_BASE if isinstance(saved.get(key), str) and saved[key]}
    public = {key: public_name(value) for key, value in named.items()}
    if public == named:
        return
    places = [Path(value).expanduser() for key, value in named.items() if public[key] != value]
    if not (folder / FILE).is_file() and places[0].exists():
        with suppress(UserError):  # not a model; the user then has to name the base
            write_base(folder, places[0])
    (folder / CONFIG).write_text(json.dumps({**saved, **public}, indent=2, sort_keys=True) + "\n")


def base_of(adapter: Path, saved: Mapping[str, Any]) -> str | None:
    """Return the base model that an adapter's folder names: a Hub id or a path.

    Published adapters contain only the name of a local folder; it resolves to the model with the same weights that adapters
    were trained on here.

    Args:
        saved: its adapter_config.json.
    """
    named = saved.get("base_model_name_or_path")
    if not named or re.search(r"[/\\]", named) or not (known := known_base(adapter)) or not set(ROUNDED) <= set(known):
        return named
    try:
        path = _remembering(known).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return named
    return path if Path(path).exists() else named


def _remembering(digests: Mapping[str, str]) -> Path:
    """Return the file that records the path of the model with these digests on this machine."""
    cache = Path(os.environ.get("FTJAX_CACHE", Path.home() / ".cache" / "ftjax"))
    return cache / "bases" / re.sub(r"\W", "", digests["bfloat16"])


def warn_of_another_base(adapter: Path, saved: Mapping[str, Any], given: str, source: TensorSource) -> None:
    """Log a warning if an adapter is applied to a model that is not its base.

    Args:
        saved: its adapter_config.json.
        given: the model's name: a Hub id, folder or file.
        source: that model's tensors.
    """
    named = saved.get("base_model_name_or_path") or saved.get("model_name")
    known = known_base(adapter)
    if known is not None:
        found = weights_digest(source)
        if not any(known.get(name) == value for name, value in found.items()):
            called = f", {named}" if named and not _alike(named, given) else ""
            _warn(
                f"{adapter}: it was made on a model with other weights than {given}{called}: another one, one into which an "
                "adapter is merged already, or one that is quantised otherwise. Its answers may be worthless"
            )
    elif named and not _alike(named, given):
        _warn(f"{adapter}: it was made on {named}, and {given} is given; on another model its answers may be worthless")


def known_base(adapter: Path) -> Mapping[str, str] | None:
    """Return the digests of an adapter's base model; None if it has none."""
    path = adapter / FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weights"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not what ftjax writes; remove the file to use the adapter unchecked") from None


def _alike(named: str, given: str) -> bool:
    """Return whether two names may mean one model: a Hub id, its folder in the Hub's cache, or a copy named like the id."""
    path, last = Path(given.removeprefix(HUB)), re.split(r"[/\\]", named.rstrip("/\\"))[-1].lower()
    cached = f"models--{named.replace('/', '--')}"
    return last in (path.name.lower(), path.resolve().name.lower()) or cached in path.resolve().parts


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print_note(text)
