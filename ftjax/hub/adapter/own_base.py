"""Whether a model is the one that an adapter was made on: by a digest of its weights in the adapter's folder, else by its name.

The digest is of a few values of every matrix, so that it takes no time, and is the same however a checkpoint is cut into files.
It stands in a file of its own beside `adapter_config.json`, in which older versions of PEFT refuse keys that they do not know.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import xxhash

from ftjax.config.load import print_note
from ftjax.errors import UserError
from ftjax.hub.fetch import HUB
from ftjax.hub.load import open_model
from ftjax.hub.source import TensorSource

FILE = "base_model.json"
VALUES = 16  # that are read of a matrix
ROUNDED = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}  # a digest of each, for bases that are stored in it


def weights_digest(source: TensorSource) -> dict[str, str]:
    """Digests of a checkpoint's matrices, rounded to each of two dtypes."""
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
    """Put the digest into an adapter's folder, and keep on this machine where the model lies.

    Args:
        base: the base model's folder or file.
    """
    digests = weights_digest(open_model(base)[1])
    (folder / FILE).write_text(json.dumps({"weights": digests}, indent=2) + "\n")
    try:
        place = _remembering(digests)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(str(base.absolute()), encoding="utf-8")
    except OSError:  # then the base is to be named
        pass


def base_of(adapter: Path, saved: Mapping[str, Any]) -> str | None:
    """The base model that an adapter's folder names: a Hub id, a path, or of a mere name the model of these weights that
    adapters were made on here. What is published has the names of folders alone.

    Args:
        saved: its adapter_config.json.
    """
    named = saved.get("base_model_name_or_path")
    if not named or re.search(r"[/\\]", named) or not (known := known_base(adapter)) or not set(ROUNDED) <= set(known):
        return named
    try:
        place = _remembering(known).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return named
    return place if Path(place).exists() else named


def _remembering(digests: Mapping[str, str]) -> Path:
    """The file that says where the model of these digests lies on this machine."""
    cache = Path(os.environ.get("FTJAX_CACHE", Path.home() / ".cache" / "ftjax"))
    return cache / "bases" / re.sub(r"\W", "", digests["bfloat16"])


def warn_of_another_base(adapter: Path, saved: Mapping[str, Any], given: str, source: TensorSource) -> None:
    """A note on stderr where an adapter is put on a model that is not its base.

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
    """The digests of an adapter's base model; None where it has none."""
    path = adapter / FILE
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weights"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not what ftjax writes; remove the file to use the adapter unchecked") from None


def _alike(named: str, given: str) -> bool:
    """Whether two names may be one model's: a Hub id, its folder in the Hub's cache, a copy under the id's last part."""
    place, last = Path(given.removeprefix(HUB)), re.split(r"[/\\]", named.rstrip("/\\"))[-1].lower()
    cached = f"models--{named.replace('/', '--')}"
    return last in (place.name.lower(), place.resolve().name.lower()) or cached in place.resolve().parts


def _warn(text: str) -> None:
    if jax.process_index() == 0:
        print_note(text)
