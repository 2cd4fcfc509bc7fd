"""`ftjax generate`: answer prompts from the command line or a file."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftjax.data.example import Example
from ftjax.distributed import store
from ftjax.distributed.agree import agree, digest
from ftjax.errors import UserError, printable
from ftjax.generate.named import LoadOptions, find_named
from ftjax.generate.request import Request
from ftjax.generate.typed import checked, read_standard_input
from ftjax.hub.same_model import model_facts


def generate(
    model: str,
    request: Request,
    options: LoadOptions,
    *,
    prompt: Sequence[str] = (),
    prompts: Path | None = None,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 32,
    as_json: bool = False,
) -> None:
    """Print an answer to each prompt, in order: the text, or one JSON object per line.

    Args:
        model: a run, a configuration file, a PEFT folder or a model (`find_named`).
        request: settings shared by all prompts.
        prompt: texts; `-` reads standard input.
        prompts: a file of prompts (`read_prompts`).
        system: a system message for each prompt.
        raw: pass texts to the model without applying its chat template.

    Raises UserError if a file, the model, the adapter or a setting is invalid.
    """
    given: list[str | Example] = [read_standard_input() if text == "-" else checked(text, "--prompt") for text in prompt]
    given += read_prompts(prompts) if prompts else []
    if not given:
        raise UserError("generate: no prompt; give --prompt TEXT (- reads the standard input) or --prompts FILE")
    found = find_named(model, adapter=options.adapter)
    if system is not None:
        if raw:
            raise UserError("generate: --system needs the chat template, which --raw leaves out; choose one")
        given = [_with_system(one, checked(system, "--system")) for one in given]

    loading = found.options(options)
    reading = {"special_tokens_in_text": loading["special_tokens_in_text"] or "split"}
    reading["fold_system"] = loading["fold_system"] is not False
    given = [replace(one, **reading) if isinstance(one, Example) else one for one in given]
    if store.several():
        facts = {"prompts": len(given), "digest of the prompts": digest(given)}
        facts["options"] = repr((request, raw, batch_size, options.dtype, reading))
        agree("what is asked", {**facts, **model_facts(found.model, loading["revision"], found.adapter)})
    from ftjax.generate.open import open_named
    from ftjax.long_steps import long_step

    with long_step(f"loading {found.name}"):
        opened = open_named(found, options)
    with long_step("generating", len(given), "answers") as step:

        def show(done: int, tokens: int) -> None:
            step.now(f"generating, {tokens:,} tokens so far")
            step.at(done)

        request = replace(request, chat=False if raw else opened.chat)
        requests = [replace(request, prompt=one, number=number) for number, one in enumerate(given)]
        answers = opened.generator.answer(requests, batch_size=batch_size, progress=show)
    if store.index():
        return
    clean = printable if sys.stdout.isatty() else str  # files get the model's text unchanged
    for asked, answer in zip(given, answers, strict=True):
        if as_json:
            row = {
                "prompt": _as_json(asked),
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": len(answer.tokens),
            }
            print(json.dumps(row, ensure_ascii=False))
        elif len(given) == 1:
            print(clean(answer.text))
        else:
            print(clean(f"--- {_shown(asked)}\n{answer.text}\n"))


def read_prompts(path: Path) -> list[str | Example]:
    """Read prompts from a file.

    A `.txt` file has one prompt per line; empty lines are skipped. Any other file that training reads (`.jsonl`, `.json`,
    `.csv`, `.parquet` ...) has one per row: in the column `prompt` (text or messages), in `messages` (without the
    assistant's answer at the end), or in the columns of one of the training formats.

    Raises UserError, naming file and line, for missing or malformed data.
    """
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
        found = [line for line in lines if line.strip()]
        if not found:
            raise UserError(f"{path}: the file is empty; expected one prompt on each line")
        return found

    from ftjax.config.data import SourceConfig
    from ftjax.data.read import read_rows
    from ftjax.data.reader import Reader

    found, reader, source = [], None, SourceConfig(path=str(path), split="train")
    rows = list(read_rows(source))
    for row in rows:
        value = row.values.get("messages", row.values.get("prompt"))
        if isinstance(value, list):
            found.append(_question(value, row.values.get("tools"), row.where))
        elif isinstance(value, str) and "messages" not in row.values:
            if not value.strip():
                raise UserError(f"{row.where}: the prompt is empty; fill it or remove the row")
            found.append(value)
        else:
            reader = reader or Reader(source, rows)
            found.append(reader(row))
    return found


def _question(messages: list[Any], tools: Any, where: str) -> Example:
    """Return the messages without the answer at the end."""
    from ftjax.data.conversation import check_messages, read_json_column

    checked = check_messages(messages, where)
    turns = len(checked)
    while turns and checked[turns - 1]["role"] == "assistant":
        turns -= 1
    if not turns:
        raise UserError(f"{where}: all messages are the assistant's, so there is nothing to answer; add a user message")
    tools = read_json_column(tools, "tools", where) if isinstance(tools, str) else tools
    return Example(where, messages=checked[:turns], prompt_turns=turns, tools=tools)


def _with_system(prompt: str | Example, system: str) -> Example:
    """Return the prompt as a conversation that begins with this system message, replacing its own."""
    messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else _messages(prompt)
    if messages is None:
        raise UserError(f"{prompt.where}: --system needs a prompt of messages, and this is plain text; leave --system out")
    messages = ({"role": "system", "content": system}, *(m for m in messages if m["role"] != "system"))
    example = Example("the prompt") if isinstance(prompt, str) else prompt
    return replace(example, prompt=None, messages=messages, prompt_turns=len(messages))


def _messages(example: Example) -> tuple[dict[str, Any], ...] | None:
    """Return the messages before the answer."""
    if example.messages is None or example.prompt_turns is not None:
        return example.messages and example.messages[: example.prompt_turns]
    last = max((n for n, m in enumerate(example.messages) if m["role"] == "assistant"), default=len(example.messages))
    return example.messages[:last]


def _as_json(prompt: str | Example) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str):
        return prompt
    return list(_messages(prompt)) if prompt.prompt is None else prompt.prompt


def _shown(prompt: str | Example) -> str:
    """Return a prompt as one line, truncated on a terminal."""
    value = _as_json(prompt)
    text = " ".join((value if isinstance(value, str) else str(value[-1].get("content"))).split())
    return text if len(text) <= 100 or not sys.stdout.isatty() else f"{text[:99]}…"
