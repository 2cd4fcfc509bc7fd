"""Reads YAML text into plain values with the place of every key, and writes it.

Two surprising rules of YAML 1.1 do not apply, as in YAML 1.2: `1e-3` is a number here (YAML 1.1: a string), and `no`, `off`
and `12:30` are strings (YAML 1.1: false, false and 750).
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

Path = tuple[str | int, ...]

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_PREFIX = "tag:yaml.org,2002:"
_MOST = 200_000  # values in one text; anchors that name anchors can stand for billions
_RESOLVERS = [("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT), ("merge", re.compile(r"^<<$"))]


@dataclass(frozen=True)
class Place:
    """A place in the input: a file's line and column (from 1), or an override's text."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One mistake and its place."""

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own class attribute)


class _Dumper(yaml.SafeDumper):
    """Quotes any string that this loader or a YAML 1.1 loader would read as something else."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # YAML folds Unicode's rarer line breaks everywhere except in double-quoted scalars, which escape them
        return self.represent_scalar(_PREFIX + "str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


for _name, _pattern in _RESOLVERS:
    _Loader.add_implicit_resolver(_PREFIX + _name, _pattern, None)
    _Dumper.add_implicit_resolver(_PREFIX + _name, _pattern, None)


class _TooMany(Exception):
    """A text has more than `_MOST` values."""


class Reader:
    """Converts a YAML text to values, with the place of each and every problem found.

    `keys[path]` and `values[path]` are the places of the key and of the value at that path.
    """

    def __init__(self, source: str):
        self.source = source
        self.keys: dict[Path, Place] = {}
        self.values: dict[Path, Place] = {}
        self.problems: list[Problem] = []

    def read(self, text: str) -> Any:
        """Return the value of `text`; None if it is empty or broken, which `problems` tells apart."""
        try:
            node = _parsed(text)
            return None if node is None else self._value(node, (), ())
        except RecursionError:
            self.problems.append(Problem(Place(self.source), "nested too deeply"))
            return None
        except _TooMany:
            self.problems.append(Problem(Place(self.source), f"more than {_MOST:,} values, with those that anchors repeat"))
            return None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self._place(mark) if mark else Place(self.source)
            hint = " (indent with spaces, not tabs)" if "'\\t'" in str(error.problem) else ""
            context = f"{error.context}, " if error.context else ""
            self.problems.append(Problem(place, f"not valid YAML: {context}{error.problem}{hint}"))
            return None
        except yaml.YAMLError as error:
            self.problems.append(Problem(Place(self.source), f"not valid YAML: {error}".replace("\n", " ")))
            return None

    def _place(self, mark: yaml.Mark) -> Place:
        return Place(self.source, mark.line + 1, mark.column + 1)

    def _value(self, node: yaml.Node, path: Path, open_nodes: tuple[int, ...]) -> Any:
        if len(self.values) >= _MOST:
            raise _TooMany
        self.values[path] = self._place(node.start_mark)
        if id(node) in open_nodes:
            self.problems.append(Problem(self._place(node.start_mark), "this anchor contains itself"))
            return None
        open_nodes = (*open_nodes, id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
            return self._mapping(node, path, open_nodes)
        if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
            return [self._value(item, (*path, index), open_nodes) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self.problems.append(Problem(self._place(node.start_mark), f"the tag {node.tag} is not supported"))
        return None

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.removeprefix(_PREFIX), node.value
        try:
            if kind in ("str", "merge"):
                return _joined(text)
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text.replace("_", ""), 0)
            if kind == "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()).replace("_", ""))
        except UnicodeDecodeError:
            self.problems.append(Problem(self._place(node.start_mark), f"{text!r} holds half a character (a lone surrogate)"))
            return None
        except (ValueError, KeyError):
            self.problems.append(Problem(self._place(node.start_mark), f"{text!r} is not a YAML {kind}"))
            return None
        self.problems.append(Problem(self._place(node.start_mark), f"the tag {node.tag} is not supported"))
        return None

    def _mapping(self, node: yaml.MappingNode, path: Path, open_nodes: tuple[int, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first: dict[str, Place] = {}
        merged = []
        for key_node, value_node in node.value:
            place = self._place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(place, "a key must be a word, not a list or a mapping"))
                continue
            if key_node.tag == _PREFIX + "merge":
                merged.append(value_node)
                continue
            key = key_node.value  # as written: `no: x` or `1: x` keep their text
            if key in first:
                dotted = ".".join(map(str, (*path, key)))
                self.problems.append(Problem(place, f"{dotted} is given twice; the first is on line {first[key].line}"))
                continue
            first[key] = place
            self.keys[(*path, key)] = place
            result[key] = self._value(value_node, (*path, key), open_nodes)
        for value_node in merged:  # `<<: *anchor` or `<<: [*a, *b]`: own keys take precedence, then those of earlier anchors
            sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for source in sources:
                if not isinstance(source, yaml.MappingNode):
                    place = self._place(value_node.start_mark)
                    self.problems.append(Problem(place, "<<: takes a mapping or a list of mappings"))
                    continue
                keys, values = dict(self.keys), dict(self.values)
                extra = self._value(source, path, open_nodes)
                if not isinstance(extra, dict):
                    continue
                for key in extra:  # keys that exist already keep their places
                    if key in result:
                        self._restore(keys, values, (*path, key))
                self.values[path] = values[path]
                result = {**extra, **result}
        return result

    def _restore(self, keys: dict[Path, Place], values: dict[Path, Place], prefix: Path) -> None:
        for places, before in ((self.keys, keys), (self.values, values)):
            for path in [path for path in places if path[: len(prefix)] == prefix]:
                if path in before:
                    places[path] = before[path]
                else:
                    del places[path]


def _parsed(text: str) -> yaml.Node | None:
    """Return the node of a YAML text. JSON may also hold tabs between its values, which YAML refuses."""
    if "\t" in text and _is_json(text):
        text = text.replace("\t", " ")  # within a string JSON writes them as \\t
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _joined(text: str) -> str:
    """Join the two halves in which JSON escapes a character beyond U+FFFF. Raises UnicodeDecodeError if one stands alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16") if re.search("[\ud800-\udfff]", text) else text


def resolve_plain(text: str) -> Any:
    """Return the value of an unquoted scalar: `1e-3` -> 0.001, `null` -> None, `true` -> True, anything else as text.

    Raises:
        ValueError: the text looks like a number and is not one (`1_` and the like never do; kept for completeness of
            `float`).
    """
    for kind, pattern in _RESOLVERS:
        if kind != "merge" and pattern.match(text):
            node = yaml.ScalarNode(_PREFIX + kind, text)
            return Reader("")._scalar(node)
    return text


def dump(value: Any) -> str:
    """Return YAML text that `Reader.read` converts to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)
