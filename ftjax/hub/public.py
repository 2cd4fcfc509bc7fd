"""Replaces local paths by names that can be published."""

import re
from collections.abc import Iterable
from pathlib import Path

from ftjax.hub.fetch import HUB, HUB_ID

FILES = (".gguf", ".jsonl", ".json", ".csv", ".parquet", ".txt")
BEFORE = r"(?<![\w./:~-])"  # a path does not begin within a word, a URL or another path
INSIDE = r"(?:[^\s/:,;'\"()`|]+/)*"  # folders of a path
ANYWHERE = re.compile(rf"{BEFORE}(?:~|\.{{1,2}})?/{INSIDE}(?=[^\s/:,;'\"()`|])")


def is_hub_id(path: str) -> bool:
    """Return whether it is `owner/name` and not a local file or folder."""
    return bool(HUB_ID.fullmatch(path)) and "/" in path and not Path(path).exists() and not path.endswith(FILES)


def public_name(path: str) -> str:
    """Return a Hub id unchanged, and the name of a local folder or file."""
    path = path.removeprefix(HUB)
    return path if is_hub_id(path) else Path(path).expanduser().name or Path(path).resolve().name


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """Shorten each path in the text to its last part.

    Args:
        known: paths that may occur in it, with spaces or without a leading slash; Hub ids stay unchanged.
    """
    folders = set()
    for path in known:
        if not is_hub_id(path.removeprefix(HUB)) and "://" not in path:
            local = Path(path).expanduser()
            forms = (Path(path), local, local.absolute(), local.resolve())
            folders |= {str(one) for form in forms for one in (form, form.parent)}
    for folder in sorted(folders - {".", "/"}, key=len, reverse=True):
        text = re.sub(rf"{BEFORE}{re.escape(folder)}/{INSIDE}", "", text)
    return ANYWHERE.sub("", text)
