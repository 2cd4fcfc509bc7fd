"""Resolves a path to data files, a Hub data set or rows in memory; the fingerprint changes when one byte of them does."""

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ftjax.config.data import SourceConfig
from ftjax.data.memory import Memory, is_kept, kept
from ftjax.errors import UserError

PLAIN = (".txt", ".md")
TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *PLAIN)
TABLES = (".parquet", ".arrow")
SUFFIXES = (*TEXT, *TABLES)
PACKED = (".gz", ".bz2", ".xz", ".zst")
# Files beside the data in a folder that describe it.
ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
NOTES = ("readme", "license", "licence", "changelog", "citation", "notice", "contributing")
KINDS = f"{', '.join(SUFFIXES)} (or {' and '.join(PACKED)} of them)"


@dataclass(frozen=True)
class Files:
    """The files of a source in a fixed order; `left_out` describes the other files of its folder."""

    paths: tuple[Path, ...]
    left_out: str = ""

    def fingerprint(self) -> str:
        """Hash every byte. Raises UserError for a file that cannot be read."""
        digest = xxhash.xxh3_128(self.left_out.encode("utf-8", "surrogateescape"))
        for path in self.paths:
            try:
                digest.update(f"{path.name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
                with path.open("rb") as file:
                    while block := file.read(1 << 22):
                        digest.update(block)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        return digest.hexdigest()

    def state(self) -> list[tuple[int, int]]:
        """Return sizes and modification times, which change when a file is written."""
        return [_state(path) for path in self.paths]


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hub or of the local Hub cache."""

    source: SourceConfig

    def fingerprint(self) -> str:
        """Return the fingerprint of `datasets`, which changes with the data. Raises UserError if there is no such data set."""
        return str(self.load()._fingerprint)

    def load(self, streaming: bool = False) -> Any:
        """Load a `datasets.Dataset`, or an `IterableDataset` if `streaming`. Raises UserError if there is none."""
        import datasets

        source = self.source
        try:
            return datasets.load_dataset(
                source.path, source.subset, split=source.split, revision=source.revision, streaming=streaming
            )
        except Exception as error:  # the Hub's, the network's and the builders' errors have no common base
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{source.path}: neither a file here (looked up from {Path.cwd()}) nor a Hub data set that could be loaded "
                f"(split {source.split}): {reason}. Give an existing path, or write {{path, subset, split, revision}}"
            ) from None


Found = Files | HubSet | Memory


def find(source: SourceConfig) -> Found:
    """Return the files, the Hub data set, or the rows in memory that `source.path` names.

    Raises UserError if there are none.
    """
    path = source.path
    if not path.strip() or "\0" in path:
        raise UserError(f"{path!r} names no data; write a file, a folder, a glob or a Hub id")
    if is_kept(path):
        return kept(path)
    location = Path(path).expanduser()
    try:
        if location.is_file():
            if kind(location) is None:
                raise UserError(f"{path}: unknown kind of file; expected {KINDS}")
            return Files((location,))
        if location.is_dir():
            return _in_folder(location, source)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if any(c in path for c in "*?["):
        found = [Path(p) for p in sorted(glob.glob(os.path.expanduser(path), recursive=True)) if Path(p).is_file()]
        if not found:
            raise UserError(f"{path}: this pattern matches no file in {Path.cwd()}")
        if wrong := [p for p in found if kind(p) is None]:
            raise UserError(f"{path}: it matches {wrong[0]}, an unknown kind of file; expected {KINDS}")
        return Files(tuple(found))
    parts = path.split("/")
    if kind(location) or path.startswith((".", "/", "~")) or len(parts) > 2:
        near = sorted(p.name for p in location.parent.iterdir() if kind(p))[:8] if location.parent.is_dir() else []
        there = f"; {location.parent} holds {', '.join(near)}" if near else ""
        raise UserError(f"{path}: no such file or folder (looked up from {Path.cwd()}){there}")
    return HubSet(source)


def kind(path: Path) -> str | None:
    """Return the suffix without compression, `.jsonl` for `a.jsonl.gz`; None for a file that cannot be read."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _in_folder(root: Path, source: SourceConfig) -> Files:
    """Find the data files of the wanted split in a folder; report files that are no data or belong to another split."""
    data, why = [], {}
    saved: dict[Path, set[str] | None] = {}
    for path in _files_below(root, why):
        if path.name.lower() in ABOUT or path.name.lower().startswith(NOTES):
            continue
        if path.parent not in saved:
            saved[path.parent] = _shards(path.parent)
        if any(part.startswith((".", "_")) for part in path.relative_to(root).parts):
            if kind(path):
                why[path] = "its name begins with . or _"
        elif kind(path) is None:
            why[path] = "unknown kind"
        elif saved[path.parent] is not None and path.name not in saved[path.parent]:
            why[path] = "not named in state.json"
        else:
            data.append(path)
    if {kind(path) in PLAIN for path in data} == {True, False}:
        why |= {path: "text beside data" for path in data if kind(path) in PLAIN}
        data = [path for path in data if path not in why]
    if not data:
        raise UserError(f"{source.path}: this folder holds no data file; expected {KINDS}{_listed(why, root)}")
    chosen = _one_split(data, source, root, why)
    return Files(chosen, f"{source.path}: {len(chosen):,} of its files are read{_listed(why, root)}" if why else "")


def _files_below(root: Path, why: dict[Path, str]) -> list[Path]:
    """Return all files below a folder, those of linked folders too; put links that lead nowhere or back, and folders that
    cannot be read, into `why`."""

    def unreadable(error: OSError) -> None:
        why[Path(error.filename)] = "cannot be read"

    found = []
    for folder, inside, files in os.walk(root, onerror=unreadable, followlinks=True):
        here = Path(folder)
        around = {here.resolve(), *here.resolve().parents}
        for name in list(inside):
            if (link := here / name).is_symlink() and link.resolve() in around:
                inside.remove(name)
                why[link] = "a link to a folder around it"
        for name in files:
            if (path := here / name).is_file():
                found.append(path)
            elif path.is_symlink() and kind(path):
                why[path] = "a link to nothing"
    return sorted(found)


def _shards(folder: Path) -> set[str] | None:
    """Return the files that `datasets.save_to_disk` wrote, without caches that later calls keep beside them; None for
    another folder.

    Raises UserError if the rows are chosen by a file of indices, as old versions wrote it.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        shards = {shard["filename"] for shard in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{folder}: its rows are chosen by a file of indices, as old versions of datasets saved them; load and save it "
            "with a newer version"
        )
    return shards


def _listed(why: dict[Path, str], root: Path) -> str:
    shown = [f"{path.relative_to(root)} ({reason})" for path, reason in list(why.items())[:8]]
    more = f" and {len(why) - len(shown):,} more" if len(why) > len(shown) else ""
    return f"; left out: {', '.join(shown)}{more}" if why else ""


# Names of splits in file and folder names of Hub data sets.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def _one_split(found: Sequence[Path], source: SourceConfig, root: Path, why: dict[Path, str]) -> tuple[Path, ...]:
    """Choose the files of the wanted split in a folder with several splits; put the others into `why`.

    Files without a split in their names are the training data, unless others are named so.
    """

    def split_of(path: Path) -> str | None:
        words = {
            w for part in path.relative_to(root).parts for w in part.lower().replace("-", ".").replace("_", ".").split(".")
        }
        return next((split for split, names in SPLITS.items() if words & set(names)), None)

    splits = {path: split_of(path) for path in found}
    if len(set(splits.values())) < 2:
        return tuple(found)
    chosen = tuple(path for path in found if splits[path] == source.split)
    if not chosen and source.split in ("train", None):
        chosen = tuple(path for path in found if splits[path] is None)
    if not chosen:
        raise UserError(
            f"{source.path}: this folder holds files of {', '.join(sorted({s for s in splits.values() if s}))}, none of "
            f"{source.split}; name the file, or write {{path, split}}"
        )
    why |= {path: splits[path] or "no split in its name" for path in found if path not in chosen}
    return chosen


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    return found.st_size, found.st_mtime_ns
