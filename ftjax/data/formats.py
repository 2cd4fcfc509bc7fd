"""Formats: how the columns of a row become an `Example`.

`FORMATS` is read from the top; `ftjax.data.reader` says which of them the rows of a source have.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ftjax.data.conversation import check_messages, read_json_column
from ftjax.data.dialect import CALLS, REASONING
from ftjax.data.example import Example, Message
from ftjax.data.preference import split_preference, transcripts, without_prompt
from ftjax.data.translate import KNOWN
from ftjax.data.values import (
    EmptyRow,
    Values,
    by_row,
    check_unicode,
    filled,
    finite,
    integers,
    kind_of,
    mask,
    optional,
    string,
)  # fmt: skip
from ftjax.errors import UserError

Read = Callable[[Values, str], Example]
PYTHON = re.compile(r"\s*\[\{'(role|content|from|value)':")


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        needs: columns that identify it.
        takes: optional columns that it reads.
        fits: a further condition on the row.
    """

    needs: tuple[str, ...]
    read: Read
    takes: tuple[str, ...] = ()
    answer: str | None = None  # the column that holds the completion
    whole: bool = False  # it reads a whole conversation, which a prompt template cannot replace
    fits: Callable[[Values], bool] = lambda values: True
    verdict: bool = False  # `label` is true or false, which an objective that prefers this format insists on
    asked_for: bool = False  # taken only if the objective prefers it, or data.format names it


def _text(v: Values, where: str) -> Example:
    return Example(where, text=filled(v, "text", where))


def _prompt_completion(v: Values, where: str) -> Example:
    prompt, answers = (by_row(_messages_in_text(v[name], name, where)) for name in ("prompt", "completion"))
    if isinstance(prompt, list) or isinstance(answers, list):
        before = prompt if isinstance(prompt, list) else _user(string(v, "prompt", where))
        after = answers if isinstance(answers, list) else _assistant(filled(v, "completion", where))
        before, after = without_prompt(before, after, where)
        return _conversation([*before, *after], v, where, prompt_turns=len(before))
    return asked(v, where, string(v, "prompt", where), filled(v, "completion", where))


ANSWERS = ("completion", "answer", "solution", "ground_truth")  # columns whose text an answer is compared with


def _prompt(v: Values, where: str) -> Example:
    """Read a prompt with nothing to imitate, and the answer beside it, if there is one, as its reference."""
    prompt = by_row(_messages_in_text(v["prompt"], "prompt", where))
    text = None if isinstance(prompt, list) else filled(v, "prompt", where)
    turns = prompt if text is None else _user(text)
    example = _conversation(turns, v, where, prompt_turns=len(turns))
    given = next((found for name in ANSWERS if (found := _reference(v, name, where)) is not None), None)
    system = optional(v, "system", where)
    if text is not None and system:
        text = f"{system}\n\n{text}"
    return replace(
        example, prompt=text, prompt_turns=len(example.messages), references=_references(v, given, where)
    )  # fmt: skip


def _reference(v: Values, name: str, where: str) -> str | None:
    """Return the text of a column, or that of the last message in it; None if there is none."""
    value = by_row(v.get(name))
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    return string({name: value}, name, where) if isinstance(value, str | int | float) else None


VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # 1.0: a table with empty labels


def is_verdict(v: Values) -> bool:
    """Return whether the label says that an answer is wanted or not, and not something else."""
    return _verdict(v) is not None


def _verdict(v: Values) -> bool | None:
    """Return whether a completion is wanted; None if the label is neither true nor false."""
    return VERDICTS.get(str(v["label"]).strip().lower())


def _unpaired_preference(v: Values, where: str) -> Example:
    return _labelled(_prompt_completion(v, where), v, where)


def _labelled(example: Example, v: Values, where: str) -> Example:
    wanted = _verdict(v)
    if wanted is None:
        raise UserError(f"{where}: 'label' is {v['label']!r:.60}, expected true or false: whether the completion is wanted")
    return replace(example, wanted=wanted, labelled=True)


def _unpaired_messages(v: Values, where: str) -> Example:
    """Read a conversation whose last answer has the label, as LLaMA-Factory has it."""
    name = next((name for name in TALKS if v.get(name)), None)
    if name is None:
        raise UserError(f"{where}: expected {' or '.join(map(repr, TALKS))} with the conversation of the label; found neither")
    turns = _listed(v[name], name, where)
    example = _conversation(turns, v, where, prompt_turns=len(turns) - 1 if isinstance(turns, list) else None)
    if example.messages[-1]["role"] != "assistant":
        raise UserError(
            f"{where}: the last message is of role {example.messages[-1]['role']}; the label is that of an answer, so expected "
            "the assistant's"
        )
    return _labelled(example, v, where)


def _preference(v: Values, where: str) -> Example:
    v = {**v, **{name: _messages_in_text(v[name], name, where) for name in ("prompt", "chosen", "rejected") if name in v}}
    asked, read, answer = v.get("prompt"), _prompt_completion, "completion"
    if not asked and not isinstance(by_row(v["chosen"]), list):  # answers alone: a conversation beside them is the prompt
        name = next((name for name in TALKS if v.get(name)), None)
        asked = name and _listed(v[name], name, where)
    found = None if asked else transcripts(v["chosen"], v["rejected"])
    if not asked and not found:
        asked, read, answer = _asked_otherwise(v, where) or (asked, read, answer)
    if found:
        count, *both = found

        def of_transcript(name: str, turns: list[Message], begin: int) -> Example:
            example = _conversation(turns, v, where, prompt_turns=count)
            return replace(example, prompt=v[name][:begin], completion=v[name][begin:])

        chosen, rejected = (of_transcript(name, *one) for name, one in zip(("chosen", "rejected"), both, strict=True))
    else:
        given = (string(v, name, where) if isinstance(v[name], int | float) else v[name] for name in ("chosen", "rejected"))
        prompt, *answers = split_preference(asked, *given, where)
        chosen, rejected = (read({**v, "prompt": prompt, answer: text}, where) for text in answers)
    return replace(chosen, rejected=rejected, margin=finite(v, "margin", where))


# Columns that hold a prompt in other data sets, where it would be wrong to take the common beginning of two answers for it.
ASKED_ELSEWHERE = "input", "query", "problem", "request", "instruct", "context", "document", "article", "post", "history"


def _asked_otherwise(v: Values, where: str) -> tuple[str, Read, str] | None:
    """Return the prompt of two texts that stand beside an instruction or a question, how it is read, and the column that the
    answer has there; None if there is neither.

    Raises UserError for another column with text that looks like a prompt.
    """
    texts = [str(v[name]) for name in ("chosen", "rejected") if isinstance(v[name], str | int | float)]
    if len(texts) < 2:
        return None
    for name, read, answer in (("instruction", _instructed, "output"), ("question", _prompt_completion, "completion")):
        if v.get(name):
            return string(v, name, where), read, answer
    for name in ASKED_ELSEWHERE:
        given = v.get(name)
        if isinstance(given, str) and given.strip() and not all(given.strip() in text for text in texts):
            raise UserError(
                f"{where}: there is no prompt, and {name!r} looks like one: write data.columns: {{prompt: {name}}} (or remove "
                "that column, if the common beginning of 'chosen' and 'rejected' is the prompt)"
            )
    return None


def _instructed(v: Values, where: str) -> Example:
    """Read an instruction whose last answer alone is trained."""
    example = _instruction(v, where)
    return replace(example, prompt_turns=len(example.messages) - 1)


def _messages_in_text(value: Any, name: str, where: str) -> Any:
    """Return the messages that a table holds as JSON text; any other value as it is.

    Raises UserError for messages as Python writes them.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    if PYTHON.match(value):
        raise UserError(f"{where}: {name!r} holds messages as Python prints them; write them as JSON (json.dumps)")
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return value
    fields = {"role", "content"}, {"from", "value"}
    return turns if all(isinstance(turn, dict) and any(both <= turn.keys() for both in fields) for turn in turns) else value


def _messages(v: Values, where: str) -> Example:
    return _conversation(_listed(v["messages"], "messages", where), v, where)


def _conversations(v: Values, where: str) -> Example:
    return _conversation(_listed(v["conversations"], "conversations", where), v, where)


def _instruction(v: Values, where: str) -> Example:
    instruction, extra = string(v, "instruction", where), optional(v, "input", where)
    output, history = filled(v, "output", where), _history(v.get("history"), where)
    system = optional(v, "system", where)
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
    question = string(v, "question", where)
    return asked(v, where, question, filled(v, "answer", where), raw=f"Question: {question}\nAnswer:")


def _document(v: Values, where: str) -> Example:
    document = string(v, "document", where)
    return asked(v, where, document, filled(v, "summary", where), raw=f"{document}\nSummary:")


def _label(v: Values, where: str) -> Example:
    if isinstance(v["label"], list | tuple):
        raise UserError(
            f"{where}: 'label' is {kind_of(v['label'])}, expected one text; several labels a row need objective: "
            "{name: classification, problem_type: multi_label_classification}"
        )
    text = string(v, "text", where)
    return asked(v, where, text, filled(v, "label", where), raw=f"{text}\nLabel:")


# Columns besides labels that say which input_ids are trained, in TRL and other tools.
MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "assistant_tokens_mask", "loss_mask", "labels_mask")


def _input_ids(v: Values, where: str) -> Example:
    ids = integers(v["input_ids"], "input_ids", where)
    if not ids:
        raise EmptyRow(f"{where}: 'input_ids' is empty, so there is nothing to learn from this row; fill or remove it")
    labels = integers(v["labels"], "labels", where) if v.get("labels") is not None else ids
    if len(labels) != len(ids):
        raise UserError(f"{where}: {len(labels)} labels for {len(ids)} input_ids; the numbers must match")
    for at, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (-100, token):
            raise UserError(
                f"{where}: labels[{at}] is {label}, expected -100 (not trained) or input_ids[{at}], {token}; "
                "labels are not shifted, as in transformers"
            )
    for name in MASKS:
        if v.get(name) is not None:
            kept = mask(v[name], name, len(ids), where)
            labels = [label if trained else -100 for label, trained in zip(labels, kept, strict=True)]
    if v.get("attention_mask") is not None:
        kept = mask(v["attention_mask"], "attention_mask", len(ids), where)
        ids, labels = ([item for item, there in zip(items, kept, strict=True) if there] for items in (ids, labels))
    return Example(where, input_ids=ids, labels=labels)


TALKS = "messages", "conversations"
CHAT = ("system", "tools", "chat_template_kwargs", "references")
FORMATS: dict[str, Format] = {
    "input_ids": Format(("input_ids",), _input_ids, ("labels", "attention_mask", *MASKS), whole=True),
    "messages": Format(("messages",), _messages, CHAT, whole=True),
    "conversations": Format(("conversations",), _conversations, CHAT, whole=True),
    "unpaired_preference": Format(("prompt", "completion", "label"), _unpaired_preference, CHAT, "completion", verdict=True),
    "unpaired_messages": Format(
        ("label",),
        _unpaired_messages,
        (*TALKS, *CHAT),
        whole=True,
        asked_for=True,
        fits=lambda v: any(v.get(name) for name in TALKS),
    ),
    "prompt": Format(("prompt",), _prompt, (*ANSWERS, *CHAT), asked_for=True),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion, CHAT, "completion"),
    "preference": Format(
        ("chosen", "rejected"),
        _preference,
        ("prompt", "margin", "question", "instruction", "input", "history", *TALKS, *CHAT),
        whole=True,
    ),
    "instruction": Format(("instruction", "output"), _instruction, ("input", "system", "history", "references"), "output"),
    "question_answer": Format(("question", "answer"), _question, CHAT, "answer"),
    "document_summary": Format(("document", "summary"), _document, CHAT, "summary"),
    "text_label": Format(("text", "label"), _label, CHAT, "label"),
    "text": Format(("text",), _text),
}


def asked(v: Values, where: str, prompt: str, answer: str, raw: str | None = None) -> Example:
    """Build an example with a text prompt; `raw` is the prompt for a model without a chat template, if it differs."""
    system = optional(v, "system", where)
    turns = [*([{"role": "system", "content": system}] if system else []), *_user(prompt), *_assistant(answer)]
    raw = prompt if raw is None else raw
    return Example(
        where, prompt=f"{system}\n\n{raw}" if system else raw, completion=answer, messages=tuple(turns),
        prompt_turns=len(turns) - 1, references=_references(v, answer, where),
        tools=_tools(v, where), template_arguments=_arguments(v, where),
    )  # fmt: skip


def _conversation(turns: Any, v: Values, where: str, prompt_turns: int | None = None) -> Example:
    messages = check_messages(turns, where)
    roles = {message["role"] for message in messages}
    if prompt_turns is None and "assistant" not in roles and (unknown := sorted(roles - KNOWN)):
        raise UserError(
            f"{where}: no message is the assistant's, and the role {', '.join(map(repr, unknown))} is not known; "
            "expected system, user, assistant or tool"
        )
    system = optional(v, "system", where)
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
    if flagged and prompt_turns is not None:  # flags say which turns are trained; those of the prompt are not
        messages = tuple(
            {**m, "train": False} if n < prompt_turns and m["role"] == "assistant" else m for n, m in enumerate(messages)
        )
        prompt_turns = None
    answers = [m["content"] for m in messages if m["role"] == "assistant" and m.get("content")]
    return Example(
        where, messages=messages, prompt_turns=prompt_turns, references=_references(v, answers[-1] if answers else None, where),
        tools=_tools(v, where), template_arguments=_arguments(v, where),
    )  # fmt: skip


def _listed(turns: Any, name: str, where: str) -> Any:
    """Return messages that are given as JSON text or by columns as a list."""
    return by_row(read_json_column(turns, name, where) if isinstance(turns, str) else turns)


def _says_something(message: Message) -> bool:
    return bool((message.get("content") or "").strip()) or any(message.get(name) for name in (*CALLS, *REASONING))


def _references(v: Values, answer: str | None, where: str) -> tuple[str, ...]:
    """Return the `references` column, a list of text, or else the answer."""
    given = v.get("references")
    if isinstance(given, str):
        given = [given]
    if given is None or (isinstance(given, list) and not given):
        return (answer,) if answer is not None else ()
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise UserError(f"{where}: 'references' is {kind_of(given)}, expected a list of text")
    check_unicode(given, "'references'", where)
    return tuple(given)


def _tools(v: Values, where: str) -> list[Any] | None:
    tools = v.get("tools")
    if isinstance(tools, str):  # pandas and others write None or null into CSV for an absent value
        tools = read_json_column(tools, "tools", where) if tools.strip() not in ("", "None", "null", "nan") else None
    tools = by_row(tools)
    if isinstance(tools, list):
        tools = [read_json_column(tool, "tools", where) if isinstance(tool, str) else tool for tool in tools]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{where}: 'tools' is {kind_of(tools)}, expected a list of JSON schemas")
    check_unicode(tools, "'tools'", where)
    return tools or None


def _arguments(v: Values, where: str) -> dict[str, Any] | None:
    arguments = v.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise UserError(f"{where}: 'chat_template_kwargs' is {kind_of(arguments)}, expected an object")
    check_unicode(arguments, "'chat_template_kwargs'", where)
    return dict(arguments) if arguments else None


def _history(given: Any, where: str) -> list[tuple[str, str]]:
    if isinstance(given, str) and given.strip():
        given = read_json_column(given, "history", where)
    if not given:
        return []
    if not isinstance(given, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in given
    ):
        raise UserError(f"{where}: 'history' is {kind_of(given)}, expected a list of [question, answer]")
    check_unicode(given, "'history'", where)
    return [(question, answer) for question, answer in given]


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]
