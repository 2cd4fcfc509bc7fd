"""What may be published: names, in place of where things lie on this machine."""

import re
from collections.abc import Iterable
from pathlib import Path

from ftjax.hub.fetch import HUB, HUB_ID

FILES = (".gguf", ".jsonl", ".json", ".csv", ".parquet", ".txt")
BEFORE = r"(?<![\w./:~-])"  # a path does not begin within a word, an address or another path
INSIDE = r"(?:[^\s/:,;'\"()`|]+/)*"  # folders of a path
ANYWHERE = re.compile(rf"{BEFORE}(?:~|\.{{1,2}})?/{INSIDE}(?=[^\s/:,;'\"()`|])")


def is_hub_id(path: str) -> bool:
    """Whether it is `owner/name`, and no file or folder of this machine."""
    return bool(HUB_ID.fullmatch(path)) and "/" in path and not Path(path).exists() and not path.endswith(FILES)


def public_name(path: str) -> str:
    """A Hub id as it is, of a folder or file its name."""
    path = path.removeprefix(HUB)
    return path if is_hub_id(path) else Path(path).expanduser().name or Path(path).resolve().name


def without_paths(text: str, known: Iterable[str] = ()) -> str:
    """The text with the last part of each path alone.

    Args:
        known: paths that may stand in it, with spaces or without a slash at their beginning; Hub ids are left as they are.
    """
    folders = set()
    for path in known:
        if not is_hub_id(path.removeprefix(HUB)) and "://" not in path:
            place = Path(path).expanduser()
            forms = (Path(path), place, place.absolute(), place.resolve())
            folders |= {str(one) for form in forms for one in (form, form.parent)}
    for folder in sorted(folders - {".", "/"}, key=len, reverse=True):
        text = re.sub(rf"{BEFORE}{re.escape(folder)}/{INSIDE}", "", text)
    return ANYWHERE.sub("", text)
