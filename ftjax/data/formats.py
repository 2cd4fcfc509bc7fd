"""What the columns of a row mean: a row becomes an `Example`.

The format is told by the columns of the first row, as TRL does, unless `data.format` names it. Columns that are called
something else are mapped with `data.columns: {prompt: question, completion: answer}` (ours: the file's).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ftjax.config.data import SourceConfig, template_fields
from ftjax.data.conversation import check_messages, from_sharegpt, read_json_column
from ftjax.data.example import Example, Message
from ftjax.data.faults import Faults
from ftjax.data.row import Row
from ftjax.errors import UserError


class EmptyRow(UserError):
    """A row in which there is nothing to learn: `data.drop_empty` drops and counts it."""


Values = Mapping[str, Any]
Read = Callable[[Values, str], Example]


@dataclass(frozen=True)
class Format:
    """`needs`: the columns that tell it. `takes`: columns that it reads where they are there."""

    needs: tuple[str, ...]
    read: Read
    takes: tuple[str, ...] = ()
    answer: str | None = None  # the column that holds the completion
    whole: bool = False  # a prompt template cannot be put in place of what it reads


def _text(v: Values, where: str) -> Example:
    return Example(where, text=_filled(v, "text", where))


def _prompt_completion(v: Values, where: str) -> Example:
    answers = v["completion"]
    if _is_list(v["prompt"]) or _is_list(answers):
        before = v["prompt"] if _is_list(v["prompt"]) else _user(_string(v, "prompt", where))
        after = answers if _is_list(answers) else _assistant(_filled(v, "completion", where))
        return _conversation([*before, *after], v, where, prompt_turns=len(before))
    return _asked(v, where, _string(v, "prompt", where), _filled(v, "completion", where))


def _preference(v: Values, where: str) -> Example:
    rejected = v["rejected"]
    if _is_list(rejected):
        check = _conversation(list(rejected), {}, where)
        rejected = check.references[-1] if check.references else ""
    elif not isinstance(rejected, str) or not rejected.strip():
        raise UserError(f"{where}: 'rejected' is {_kind(rejected)}, expected an answer as text or messages")
    if "prompt" not in v and _is_list(v["chosen"]):
        example = _conversation(list(v["chosen"]), v, where)
    else:
        missing = "prompt" not in v
        example = _prompt_completion({**v, "prompt": "" if missing else v["prompt"], "completion": v["chosen"]}, where)
    return replace(example, rejected=rejected)


def _messages(v: Values, where: str) -> Example:
    turns = v["messages"]
    if isinstance(turns, str):
        turns = read_json_column(turns, "messages", where)
    return _conversation(turns, v, where)


def _conversations(v: Values, where: str) -> Example:
    turns = v["conversations"]
    if isinstance(turns, str):
        turns = read_json_column(turns, "conversations", where)
    return _conversation(from_sharegpt(turns, where), v, where)


def _instruction(v: Values, where: str) -> Example:
    instruction, extra = _string(v, "instruction", where), _optional(v, "input", where)
    output, history = _filled(v, "output", where), _history(v.get("history"), where)
    system = _optional(v, "system", where)
    blocks = [system] if system else []
    for question, answer in history:
        blocks.append(f"### Instruction:\n{question}\n\n### Response:\n{answer}")
    blocks.append(f"### Instruction:\n{instruction}")
    blocks += [f"### Input:\n{extra}"] if extra else []
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        turns += [*_user(question), *_assistant(answer)]
    turns += [*_user(f"{instruction}\n\n{extra}" if extra else instruction), *_assistant(output)]
    return Example(
        where, prompt="\n\n".join([*blocks, "### Response:\n"]), completion=output, messages=tuple(turns),
        references=_references(v, output, where),
    )  # fmt: skip


def _question(v: Values, where: str) -> Example:
    question = _string(v, "question", where)
    return _asked(v, where, question, _filled(v, "answer", where), raw=f"Question: {question}\nAnswer:")


def _document(v: Values, where: str) -> Example:
    document = _string(v, "document", where)
    return _asked(v, where, document, _filled(v, "summary", where), raw=f"{document}\nSummary:")


def _label(v: Values, where: str) -> Example:
    text = _string(v, "text", where)
    return _asked(v, where, text, _filled(v, "label", where), raw=f"{text}\nLabel:")


def _input_ids(v: Values, where: str) -> Example:
    ids = _integers(v["input_ids"], "input_ids", where)
    if not ids:
        raise EmptyRow(f"{where}: 'input_ids' is empty, so there is nothing to learn from this row; fill or remove it")
    labels = _integers(v["labels"], "labels", where) if v.get("labels") is not None else ids
    if len(labels) != len(ids):
        raise UserError(f"{where}: {len(labels)} labels for {len(ids)} input_ids; they must be as many")
    for at, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (-100, token):
            raise UserError(
                f"{where}: labels[{at}] is {label}, expected -100 (not trained) or input_ids[{at}], {token}; "
                "labels are not shifted, as in transformers"
            )
    mask = v.get("attention_mask")
    if mask is not None:
        keep = _integers(mask, "attention_mask", where)
        if len(keep) != len(ids):
            raise UserError(f"{where}: {len(keep)} values of attention_mask for {len(ids)} input_ids; they must be as many")
        ids = [token for token, kept in zip(ids, keep, strict=True) if kept]
        labels = [label for label, kept in zip(labels, keep, strict=True) if kept]
    return Example(where, input_ids=ids, labels=labels)


CHAT = ("system", "tools", "chat_template_kwargs", "references")
FORMATS: dict[str, Format] = {  # the first whose columns are all there is taken
    "input_ids": Format(("input_ids",), _input_ids, ("labels", "attention_mask"), whole=True),
    "messages": Format(("messages",), _messages, CHAT, whole=True),
    "conversations": Format(("conversations",), _conversations, CHAT, whole=True),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion, CHAT, "completion"),
    "preference": Format(("chosen", "rejected"), _preference, ("prompt", *CHAT), whole=True),
    "instruction": Format(("instruction", "output"), _instruction, ("input", "system", "history", "references"), "output"),
    "question_answer": Format(("question", "answer"), _question, CHAT, "answer"),
    "document_summary": Format(("document", "summary"), _document, CHAT, "summary"),
    "text_label": Format(("text", "label"), _label, CHAT, "label"),
    "text": Format(("text",), _text),
}


class Reader:
    """Rows of one source into examples. After reading, `seen` holds the columns that were there, `unused` those not read."""

    def __init__(self, source: SourceConfig, first: Row, normalize: Callable[[str], str] | None = None):
        self.source = source
        self.columns = source.columns or {}
        self.normalize = normalize
        self.template = _Template(source.template) if source.template else None
        self.completion_template = _Template(source.completion_template) if source.completion_template else None
        values = self._rename(first)
        self.name = self._detect(values, first) if source.format in (None, "auto") else source.format
        self.format = FORMATS[self.name]
        if self.template and self.format.whole:
            raise UserError(
                f"{first.where}: data.template makes a prompt out of columns, but format {self.name} has none of its own"
            )
        self.seen: dict[str, None] = {}
        self.answers_unspaced = 0

    @property
    def unused(self) -> list[str]:
        used = {*self.format.needs, *self.format.takes}
        if self.template:
            used = {self.format.answer, *CHAT, *self.template.fields}
        if self.completion_template:
            used |= {*self.completion_template.fields}
        theirs = {ours: self.columns.get(ours, ours) for ours in used}
        return [name for name in self.seen if name not in theirs.values() and name not in used]

    def __call__(self, row: Row) -> Example:
        """Raises UserError, with file and line, where a column is missing or holds something else."""
        self.seen.update(dict.fromkeys(row.values))
        values = self._rename(row)
        where = row.where
        if self.normalize:
            values = {name: _normalized(value, self.normalize) for name, value in values.items()}
        completion = None
        if self.completion_template:
            completion = self.completion_template(values, where)
            values[self.format.answer or "completion"] = completion
        if self.template:
            return self._templated(values, where, completion)
        self._need(values, row)
        example = self.format.read(values, where)
        if completion is None and example.prompt is not None and self.name not in ("prompt_completion", "preference"):
            example = replace(example, completion=_spaced(example.prompt, example.completion))
        return example

    def _templated(self, values: dict[str, Any], where: str, completion: str | None) -> Example:
        prompt, answer = self.template(values, where), self.format.answer or "completion"
        if answer not in values:
            raise UserError(f"{where}: expected {answer!r} for the completion; found {_names(values)}")
        if completion is None:
            completion = _filled(values, answer, where)
        elif not completion.strip():
            raise EmptyRow(f"{where}: the completion is empty, so there is nothing to learn from this row; fill or remove it")
        example = _asked(values, where, prompt, completion)
        return example if self.completion_template else replace(example, completion=_spaced(prompt, completion))

    def _need(self, values: Values, row: Row) -> None:
        missing = [name for name in self.format.needs if name not in values]
        if missing:
            raise UserError(
                f"{row.where}: expected {_quoted(self.format.needs)} (format {self.name}); found {_names(row.values)}. "
                f"Map them with data.columns, such as data.columns: {{{missing[0]}: {next(iter(row.values), 'name')}}}"
            )

    def _detect(self, values: Values, row: Row) -> str:
        names = set(values)
        if self.completion_template:
            names.add("completion")
        if self.template:  # the prompt is the template's; the first completion that is there is the answer
            answers = {f.answer: name for name, f in FORMATS.items() if f.answer}
            name = next((answers[column] for column in answers if column in names), None)
            if name is None:
                raise UserError(
                    f"{row.where}: data.template makes the prompt, and no column holds the completion; found "
                    f"{_names(row.values)}. Name it with data.columns: {{completion: NAME}}, or write data.completion_template"
                )
            return name
        for name, form in FORMATS.items():
            if set(form.needs) <= names:
                return name
        known = " or ".join(_quoted(form.needs, " and ") for form in FORMATS.values())
        raise UserError(
            f"{row.where}: expected columns {known}; found {_names(row.values)}. Map them with data.columns, such as "
            f"data.columns: {_suggested(list(row.values))}"
        )

    def _rename(self, row: Row) -> dict[str, Any]:
        if not self.columns:
            return dict(row.values)
        absent = [theirs for theirs in self.columns.values() if theirs not in row.values]
        if absent:
            raise UserError(f"{row.where}: data.columns names {_quoted(absent)}, but the row has {_names(row.values)}")
        taken = set(self.columns.values())
        kept = {name: value for name, value in row.values.items() if name not in taken and name not in self.columns}
        return kept | {ours: row.values[theirs] for ours, theirs in self.columns.items()}


def to_examples(rows: Iterable[Row], source: SourceConfig | None = None, faults: Faults | None = None) -> Iterator[Example]:
    """Every row of a source as an example, for `evaluate` and others that need the text rather than the tokens.

    Raises UserError, with file and line, for a row that is wrong, unless `faults` skips it.
    """
    faults, reader = faults or Faults(), None
    for row in rows:
        reader = reader or Reader(source or SourceConfig(path=row.where), row)
        try:
            yield reader(row)
        except UserError as error:
            faults(error)


class _Template:
    """`Question: {question}\\nAnswer:` filled from the columns of a row; an absent value is nothing."""

    def __init__(self, template: str):
        self.template, self.fields = template, template_fields(template)

    def __call__(self, values: Values, where: str) -> str:
        missing = [name for name in self.fields if name not in values]
        if missing:
            raise UserError(f"{where}: the template names {_quoted(missing)}; found {_names(values)}")
        texts = {name: "" if values[name] is None else _string(values, name, where) for name in self.fields}
        return self.template.format_map(texts)


def _asked(v: Values, where: str, asked: str, answer: str, raw: str | None = None) -> Example:
    """A prompt that is text; `raw` is how a model without a chat template sees it, where that is not the text itself."""
    system = _optional(v, "system", where)
    turns = [*([{"role": "system", "content": system}] if system else []), *_user(asked), *_assistant(answer)]
    raw = asked if raw is None else raw
    return Example(
        where, prompt=f"{system}\n\n{raw}" if system else raw, completion=answer, messages=tuple(turns),
        prompt_turns=len(turns) - 1, references=_references(v, answer, where),
        tools=_tools(v, where), template_arguments=_arguments(v, where),
    )  # fmt: skip


def _conversation(turns: Any, v: Values, where: str, prompt_turns: int | None = None) -> Example:
    if isinstance(turns, tuple):
        turns = list(turns)
    messages = check_messages(turns, where)
    system = _optional(v, "system", where)
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
        prompt_turns = None if prompt_turns is None else prompt_turns + 1
    flagged = any("train" in m or "weight" in m for m in messages)
    for number, message in enumerate(messages):
        learned = message["role"] == "assistant" and message.get("train", True) and message.get("weight", 1)
        if learned and (prompt_turns is None or number >= prompt_turns) and not _says_something(message):
            raise EmptyRow(
                f"{where}: message {number} of the assistant is empty, so there is nothing to learn from it; fill or "
                'remove it, or mark it "train": false'
            )
    if flagged and prompt_turns is not None:  # marks say which turns are trained; those of the prompt are not
        messages = tuple(
            {**m, "train": False} if n < prompt_turns and m["role"] == "assistant" else m for n, m in enumerate(messages)
        )
        prompt_turns = None
    answers = [m["content"] for m in messages if m["role"] == "assistant" and m.get("content")]
    return Example(
        where, messages=messages, prompt_turns=prompt_turns, references=_references(v, answers[-1] if answers else None, where),
        tools=_tools(v, where), template_arguments=_arguments(v, where),
    )  # fmt: skip


def _says_something(message: Message) -> bool:
    others = ("tool_calls", "reasoning_content", "thinking", "function_call")
    return bool((message.get("content") or "").strip()) or any(message.get(name) for name in others)


def _references(v: Values, answer: str | None, where: str) -> tuple[str, ...]:
    """The `references` column, a list of text, or else the answer."""
    given = v.get("references")
    if isinstance(given, str):
        given = [given]
    if given is None or (isinstance(given, list) and not given):
        return (answer,) if answer is not None else ()
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise UserError(f"{where}: 'references' is {_kind(given)}, expected a list of text")
    return tuple(given)


def _tools(v: Values, where: str) -> list[Any] | None:
    tools = v.get("tools")
    if isinstance(tools, str):
        tools = read_json_column(tools, "tools", where) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{where}: 'tools' is {_kind(tools)}, expected a list of JSON schemas")
    return [_without_nulls(tool) for tool in tools] if tools else None


def _without_nulls(value: Any) -> Any:
    """Tables fill the keys that other rows have with null."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _arguments(v: Values, where: str) -> dict[str, Any] | None:
    arguments = v.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise UserError(f"{where}: 'chat_template_kwargs' is {_kind(arguments)}, expected an object")
    return {name: value for name, value in arguments.items() if value is not None} if arguments else None


def _history(given: Any, where: str) -> list[tuple[str, str]]:
    if isinstance(given, str) and given.strip():
        given = read_json_column(given, "history", where)
    if not given:
        return []
    if not isinstance(given, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in given
    ):
        raise UserError(f"{where}: 'history' is {_kind(given)}, expected a list of [question, answer]")
    return [(question, answer) for question, answer in given]


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _spaced(prompt: str, completion: str) -> str:
    """`Answer:` and `5` are joined by a space; what ends or begins with white space is joined as it is."""
    return completion if not prompt or prompt[-1].isspace() or completion[:1].isspace() else f" {completion}"


def _string(v: Values, name: str, where: str) -> str:
    value = v[name]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: {name!r} is {value}, expected text")
    if isinstance(value, int | float):
        try:
            return str(value)
        except ValueError as error:  # a number of more digits than Python converts
            raise UserError(f"{where}: {name!r}: {error}") from None
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} is {_kind(value)}, expected text")
    if not value.isascii():
        _check_unicode(value, name, where)
    return value


def _check_unicode(text: str, name: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {name!r} holds half of a character, {text[error.start]!r} (a lone surrogate); write the text as UTF-8"
        ) from None


def _optional(v: Values, name: str, where: str) -> str:
    return "" if v.get(name) is None else _string(v, name, where)


def _filled(v: Values, name: str, where: str) -> str:
    if v[name] is None or (isinstance(v[name], str) and not v[name].strip()):
        raise EmptyRow(f"{where}: {name!r} is empty, so there is nothing to learn from this row; fill or remove it")
    return _string(v, name, where)


def _integers(values: Any, name: str, where: str) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError(f"{where}: {name!r} is {_kind(values)}, expected a list of whole numbers")
    return values


def _normalized(value: Any, normalize: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return normalize(value)
    if isinstance(value, list):
        return [_normalized(item, normalize) for item in value]
    return {key: _normalized(item, normalize) for key, item in value.items()} if isinstance(value, dict) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", str: "text", int: "a number", float: "a number", dict: "an object"}
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of {_kind(value[0]).removeprefix('a ')}"
    return names.get(type(value), type(value).__name__)


def _quoted(names: Iterable[str], join: str = ", ") -> str:
    return join.join(f'"{name}"' for name in names)


def _names(values: Iterable[str]) -> str:
    names = list(values)
    return _quoted(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "no columns"


def _suggested(names: list[str]) -> str:
    if len(names) == 1:
        return f"{{text: {names[0]}}}"
    return f"{{prompt: {names[0]}, completion: {names[1]}}}" if names else "{prompt: question, completion: answer}"
