"""Loads a configuration from a YAML file and `key=value` overrides, and saves it.

Steps in order: read (YAML with the place of every key), move aliases to their keys, apply overrides, resolve `${...}`,
convert per-device counts, validate. Problems are collected and reported together.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

from ftjax.config import Config
from ftjax.config.alias import CASELESS, VALUES, Alias, plain_name
from ftjax.config.code import LEADS_TO_CODE, is_recorded
from ftjax.config.explain import explain
from ftjax.config.interpolate import escape, interpolate, resolvers
from ftjax.config.moved import alias_at, switched
from ftjax.config.schema import defaults, section_fields, variants, with_default_tag
from ftjax.config.unusual import unusual
from ftjax.config.yaml_text import Path, Place, Problem, Reader, dump, resolve_plain
from ftjax.errors import UserError

Override = str | tuple[str, Any]  # `dotted.key=value` with the value in YAML, or key and value in Python
_MISSING = object()
_KEY = re.compile(r"^[^\s=.\[\]{}]+(?:\.[^\s=.\[\]{}]+)*$")


def print_note(text: str) -> None:
    """Write a note to stderr, apart from results."""
    from ftjax.console import make_console, say

    say(make_console(stderr=True), text if text.startswith("warning: ") else f"note: {text}")


def load_config(
    path: str | FilePath, overrides: Sequence[Override] = (), *, note: Callable[[str], None] = print_note, asked: bool = True
) -> Config:
    """Read, override and validate a configuration.

    Args:
        overrides: `dotted.key=value` with the value in YAML (`method.r=16`, `method.target_modules=[q_proj, v_proj]`,
            `method={name: full}` to replace a section), or pairs of key and value.
        note: called with one line for each accepted alias.
        asked: False if the user named a run and not this file, which then may not run code (`ftjax.config.code`) or read the
            environment.

    Raises:
        UserError: names every mistake found, each with file, line and column or with the override's text.
    """
    loading = _Loading(str(path), note)
    loading.read_file(_read_text(FilePath(path)))
    loading.move_aliases()
    for override in overrides:
        loading.override(override)
    recorded = not asked or is_recorded(FilePath(path))
    if recorded:
        loading.refuse_resolvers()
    config = loading.finish()
    if recorded:
        config._unasked = loading.not_overridden(LEADS_TO_CODE)
    return config


def config_of(
    tree: dict[str, Any],
    overrides: Sequence[Override] = (),
    *,
    source: str = "the command line",
    note: Callable[[str], None] = print_note,
) -> Config:
    """Build a configuration from plain values, in which `${` is no reference, with overrides as in `load_config`.

    Raises:
        UserError: names every mistake found.
    """
    loading = _Loading(source, note)
    loading.tree = escape({name: {} if value is None and name in section_fields() else value for name, value in tree.items()})
    loading.move_aliases()
    for override in overrides:
        loading.override(override)
    return loading.finish()


def save_config(config: Config, path: str | FilePath) -> None:
    """Write every key of `config`, resolved; `load_config` returns an equal one. The file is written completely or not at
    all."""
    path = FilePath(path)
    text = dump(escape(config.model_dump(mode="json")))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the run from others
        os.replace(temporary, path)
    except BaseException:
        FilePath(temporary).unlink(missing_ok=True)
        raise


def flatten_config(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted key; lists and free mappings (`data.columns`) stay whole."""
    flat: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        for name in type(value).model_fields:
            item = getattr(value, name)
            if hasattr(type(item), "model_fields"):
                walk(item, f"{prefix}{name}.")
            else:
                flat[prefix + name] = item

    walk(config, "")
    return flat


def diff_configs(a: Config, b: Config) -> list[str]:
    """Return the dotted keys whose values differ, in the order of the schema; only `method.name` if the methods differ."""
    one, two = flatten_config(a), flatten_config(b)
    differing = [key for key in {**one, **two} if one.get(key, _MISSING) != two.get(key, _MISSING)]
    for section, field in section_fields().items():
        name = f"{section}.{field.discriminator}"
        if variants(field) and name in differing:
            differing = [key for key in differing if key == name or not key.startswith(f"{section}.")]
    return differing


def shown_value(value: object) -> str:
    """Return a setting on one line, as a configuration file has it but for braces; long ones are cut."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, list):
        value = [one.model_dump(mode="json", exclude_defaults=True) if isinstance(one, BaseModel) else one for one in value]
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _read_text(path: FilePath) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml"))[:8] if path.parent.is_dir() else []
        there = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise UserError(f"{path}: there is no such configuration file{there}") from None
    except IsADirectoryError:
        inside = path / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else "; name a .yaml file"
        raise UserError(f"{path}: this is a folder, not a configuration file{hint}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


class _Loading:
    """The state of one `load_config` call: the tree so far, where each part was written, and the problems found."""

    def __init__(self, source: str, note: Callable[[str], None]):
        self.source = source
        self.note = note
        self.tree: dict[str, Any] = {}
        self.keys: dict[Path, Place] = {}
        self.values: dict[Path, Place] = {}
        self.problems: list[Problem] = []
        self.per_device: dict[Path, tuple[str, Alias]] = {}
        self.overridden: dict[Path, str] = {}
        self.override_sources: list[str] = []

    def read_file(self, text: str) -> None:
        reader = Reader(self.source)
        tree = reader.read(text)
        self.problems += reader.problems
        if tree is None and self.problems:
            self._raise()
        if tree is None:
            raise UserError(f"{self.source}: the file is empty; a configuration names at least model.path and data.train")
        if not isinstance(tree, dict):
            kind = "a list" if isinstance(tree, list) else "a single value"
            raise UserError(f"{self.source}:1: expected sections (model:, data:, ...), found {kind}")
        self.tree, self.keys, self.values = tree, reader.keys, reader.values
        for name in section_fields():
            if tree.get(name, _MISSING) is None:  # `training:` without content
                tree[name] = {}

    def move_aliases(self) -> None:
        """Move the values of other tools' keys, at the top or in a section, to ftjax's keys."""
        places: list[Path] = [(key,) for key in self.tree]
        places += [(name, key) for name in section_fields() if isinstance(self.tree.get(name), dict) for key in self.tree[name]]
        known = [(path, alias) for path in places if (alias := alias_at(path)) is not None]
        # switches that are on come first: `bf16: false` beside `fp16: true` then changes nothing
        for path, alias in sorted(known, key=lambda one: one[1].switch is not None and self._at(one[0]) is False):
            parent = self.tree if len(path) == 1 else self.tree[path[0]]
            self._move(path, alias, parent.pop(path[-1]), self._place(path))

    def _move(self, path: Path, alias: Alias, value: Any, place: Place) -> None:
        target: Path = tuple(alias.target.split("."))
        section = self.tree if len(target) == 1 else self.tree.setdefault(target[0], {})
        if not isinstance(section, dict):
            return  # `method: lora` beside `lora_rank: 8`: the error is the section's
        if self._holds(alias, value):
            self.note(f"{place}: {_dotted(path)}: false changes nothing: {alias.target} is not {alias.switch}")
        elif target[-1] in section:
            self._problem(
                place, f"{_dotted(path)} means {alias.target}, which is given too ({self._place(target)}); keep one of them"
            )
        else:
            self.keys[target] = place
            self._forget(target, self.values)
            self.values[target] = self.values.get(path, place)
            section[target[-1]] = self._converted(path, alias, value, place)

    def _at(self, path: Path) -> Any:
        value: Any = self.tree
        for piece in path:
            value = _mapping(value).get(piece)
        return value

    def _holds(self, alias: Alias, value: Any) -> bool:
        """Return whether a switch is set to false and its target has another value anyway."""
        if alias.switch is None or value is not False:
            return False
        section, key = alias.target.split(".")
        return {**defaults({}).get(section, {}), **_mapping(self.tree.get(section))}.get(key) != alias.switch

    def override(self, given: Override) -> None:
        """Apply one override."""
        if not isinstance(given, str):
            key, value = given
            place = Place(f"argument {key}")
            self.override_sources.append(place.source)
            if not _KEY.match(key):
                return self._problem(place, "not a key; write section__key=value, for example training__max_steps=100")
            return self._set(key, escape(value), place)
        place = Place(f"override '{given}'")
        self.override_sources.append(place.source)
        key, equals, written = given.partition("=")
        key = key.strip()
        if not equals or not _KEY.match(key):
            return self._problem(place, "write overrides as key=value, for example training.max_steps=100")
        if not written.strip():
            return self._problem(place, f"the value is empty; write {key}=null for none, or {key}='\"\"' for an empty string")
        return self._set(key, self._override_value(written.strip(), place), place)

    def _set(self, key: str, value: Any, place: Place) -> None:
        """Set the value of a dotted key, which may be another tool's name."""
        path: Path = tuple(key.split("."))
        alias = alias_at(path)
        self._forget(path, self.per_device)
        if alias is not None:
            target = tuple(alias.target.split("."))
            if self._holds(alias, value):
                return self.note(f"{place}: changes nothing: {alias.target} is not {alias.switch}")
            value, path = self._converted(path, alias, value, place), target
        if self.overridden.setdefault(path, key) != key:
            return self._problem(place, f"{_dotted(path)} is overridden twice, as {self.overridden[path]} and as {key}")
        container: Any = self.tree
        for index, piece in enumerate(path):
            here, last = path[: index + 1], index == len(path) - 1
            if isinstance(container, list):
                if not str(piece).isdigit() or int(piece) >= len(container):
                    what = f"{_dotted(path[:index])} is a list of {len(container)}"
                    return self._problem(place, f"{what}; {piece} is none of its items (0, 1, ...)")
                piece = int(piece)
                path = (*path[:index], piece, *path[index + 1 :])
                here = path[: index + 1]
            elif not isinstance(container, dict):
                return self._problem(place, f"{_dotted(path[:index])} is a single value and has no key {piece}")
            if last:
                for places in (self.keys, self.values):
                    self._forget(here, places)
                    places[here] = place
                container[piece] = {} if value is None and len(path) == 1 and piece in section_fields() else value
            else:
                if isinstance(container, dict) and container.get(piece) is None:
                    container[piece] = {}
                    self.keys[here] = self.values[here] = place
                container = container[piece]
        return None

    def refuse_resolvers(self) -> None:
        """Report the values of a run's file that read the environment: somebody else's file could send it elsewhere."""
        for path, text in resolvers(self.tree):
            if self._place(path).source not in self.override_sources:
                self._report_value(
                    path,
                    f"{text!r} is resolved in configurations of your own only: this file is a run's, which may be somebody "
                    f"else's, and its references may only name keys. Write the value, or set it on the command line: "
                    f"{_dotted(path)}=...",
                )

    def finish(self) -> Config:
        self.move_aliases()  # those in the sections that overrides gave as a whole
        for name, field in section_fields().items():
            if field.is_required():
                self.tree.setdefault(name, {})  # so that errors name the missing keys themselves
            if isinstance(self.tree.get(name), dict):
                self.tree[name] = with_default_tag(name, self.tree[name])
        self._replace_values()
        self.tree = interpolate(self.tree, defaults(self.tree), self._report_value)
        self._convert_per_device()
        try:
            config = Config.model_validate(self.tree)
        except ValidationError as error:
            explain(error, self.tree, self._report)
        if self.problems:
            self._raise()
        for text in unusual(config):
            self.note(f"warning: {text}")
        return config

    def not_overridden(self, keys: Iterable[str]) -> frozenset[str]:
        """Return those of the dotted keys that no override has set."""
        return frozenset(key for key in keys if self._place(tuple(key.split("."))).source not in self.override_sources)

    def _replace_values(self) -> None:
        """Replace other tools' values by ftjax's, such as `method.name: qlora`."""
        for dotted, known in VALUES.items():
            path: Path = tuple(dotted.split("."))
            value = _mapping(self.tree.get(path[0])).get(path[1])
            if not isinstance(value, str):
                continue
            word = plain_name(value)
            meant = known.get(word, {dotted: word} if dotted in CASELESS else {})
            if not meant or meant == {dotted: value}:
                continue
            for key, wanted in meant.items():
                section, name = key.split(".")
                here = self.tree.setdefault(section, {})
                if not isinstance(here, dict):
                    continue
                if key != dotted and here.get(name, wanted) != wanted:
                    self._report(path, f"{dotted}: {value} means {key}: {_short(wanted)}, and {_short(here[name])} is given; "
                                       f"write {dotted}: {meant[dotted]} and keep what you mean")  # fmt: skip
                    continue
                here[name] = wanted
            said = ", ".join(f"{key}: {_short(wanted)}" for key, wanted in meant.items())
            self.note(f"{self._place(path)}: {dotted}: {value} is read as {said}")

    def _override_value(self, text: str, place: Place) -> Any:
        if text[0] not in "[{\"'":
            return resolve_plain(text)
        reader = Reader(place.source)
        value = reader.read(text)
        for problem in reader.problems:
            self._problem(place, problem.message)
        return value

    def _converted(self, path: Path, alias: Alias, value: Any, place: Place) -> Any:
        target: Path = tuple(alias.target.split("."))
        self.per_device.pop(target, None)
        if alias.per_device:
            self.per_device[target] = (_dotted(path), alias)
            return value
        if alias.convert is not None or alias.switch is not None:
            try:
                converted = alias.convert(value) if alias.convert is not None else switched(alias, value)
            except ValueError as error:
                self._problem(place, f"{_dotted(path)}: {error}")
                return value
            if converted != value:
                self.note(f"{place}: {_dotted(path)}: {_short(value)} is read as {alias.target}: {_short(converted)}")
                return converted
        self.note(f"{place}: {_dotted(path)} is read as {alias.target}")
        return value

    def _convert_per_device(self) -> None:
        known = defaults(self.tree)
        training, mesh = ({**known[name], **_mapping(self.tree.get(name))} for name in ("training", "mesh"))
        for target, (written, alias) in self.per_device.items():
            try:
                value = int(training[target[-1]])
                accumulation = int(training["gradient_accumulation_steps"]) if alias.per_micro_batch else 1
                axes = [int(mesh[axis]) for axis in ("data", "fsdp", "slices")]
            except (ValueError, TypeError):
                continue  # one of them is wrong and reported separately
            devices = 1
            for axis in axes:
                devices *= max(axis, 1)
            total = value * accumulation * devices
            self.tree[target[0]][target[-1]] = total
            steps = f" x {accumulation} accumulation steps" if alias.per_micro_batch else ""
            text = f"{self._place(target)}: {written}: {value} is read as {alias.target}: {total}"
            text += f" ({value} rows{steps} x {devices} device{'s' if devices > 1 else ''})"
            if min(axes) < 0:
                text += (
                    f"; it counts rows on each device and the mesh leaves their number open, so one was taken: "
                    f"on N devices write {alias.target}: {total} x N"
                )
            self.note(text)

    def _place(self, path: Path) -> Place:
        """Return the place of the key at `path`, or of the nearest part around it that was written."""
        for length in range(len(path), 0, -1):
            for places in (self.keys, self.values):
                if path[:length] in places:
                    return places[path[:length]]
        return Place(self.source)

    def _report(self, path: Path, message: str) -> None:
        self._problem(self._place(path), message)

    def _report_value(self, path: Path, message: str) -> None:
        self._problem(self._place(path), f"{_dotted(path)}: {message}")

    def _problem(self, place: Place, message: str) -> None:
        self.problems.append(Problem(place, message))

    @staticmethod
    def _forget(path: Path, places: dict[Path, Any]) -> None:
        for known in [known for known in places if known[: len(path)] == path]:
            del places[known]

    def _raise(self) -> None:
        given = {source: number for number, source in enumerate(self.override_sources)}
        ordered = sorted(self.problems, key=lambda p: (given.get(p.place.source, -1), p.place.line or 0, p.place.column or 0))
        lines = list(dict.fromkeys(map(str, ordered)))
        if len(lines) == 1:
            raise UserError(lines[0])
        raise UserError(f"{self.source}: {len(lines)} errors\n" + "\n".join(f"  {line}" for line in lines))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _short(value: Any) -> str:
    return dump([value])[2:].strip() if not isinstance(value, list | dict) else str(value)
