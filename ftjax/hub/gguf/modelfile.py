"""Writes a Modelfile, with which Ollama takes up a GGUF file: `ollama create NAME -f Modelfile`.

Ollama has templates of its own kind (Go's text/template). One is made of a chat template that puts fixed texts around
messages, and checked on a longer conversation.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.data.template import Template
from ftjax.errors import UserError

# Settings of generation_config.json under Ollama's names, used if it asks for sampling.
SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
SYSTEM, ASKED, ANSWERED = "@SYSTEM@", "@ASKED@", "@ANSWERED@"


class Frame(NamedTuple):
    """The texts before and after a message of each role; `default` stands where there is no system message."""

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    default: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a conversation, with the prompt of the next answer."""
        first = messages[0]["role"] == "system"
        text = f"{self.system[0]}{messages[0]['content']}{self.system[1]}" if first and self.system else self.default
        for message in messages[int(first) :]:
            before, after = self.user if message["role"] == "user" else self.assistant
            text += before + message["content"] + after
        return text + self.assistant[0]

    def go(self) -> str:
        """Return Ollama's template."""
        start = self.default
        if self.system:
            start = f"{{{{ if .System }}}}{self.system[0]}{{{{ .System }}}}{self.system[1]}"
            start += f"{{{{ else }}}}{self.default}{{{{ end }}}}" if self.default else "{{ end }}"
        turns = ("user", self.user), ("assistant", self.assistant)
        each = [f'{{{{ if eq .Role "{role}" }}}}{a}{{{{ .Content }}}}{b}{{{{ end }}}}' for role, (a, b) in turns]
        return f"{start}{{{{ range .Messages }}}}{''.join(each)}{{{{ end }}}}{self.assistant[0]}"


def frame_of(tokenizer: Any) -> Frame | None:
    """Return the texts that a chat template puts around messages; None if it does more than that."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    template, ids = Template(tokenizer), tokenizer("a").input_ids
    bos = tokenizer.bos_token if tokenizer.bos_token_id == ids[0] and len(ids) > 1 else ""

    def render(*turns: tuple[str, str], generation: bool = True) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return template.render(messages, generation, "a probe").removeprefix(bos)  # llama.cpp puts BOS before

    user, answer = ("user", ASKED), ("assistant", ANSWERED)
    try:
        head, _, tail = render(user).partition(ASKED)
        after_user = render(user, generation=False).partition(ASKED)[2]
        between = render(user, answer, user).partition(ANSWERED)[2].partition(ASKED)[0]
    except UserError:
        return None
    # An answer ends as a question does, or in what is not the beginning of the next question.
    before_user = between.removeprefix(after_user)
    if not after_user or not head.endswith(before_user):
        before_user = next(between[cut:] for cut in range(len(between) + 1) if head.endswith(between[cut:]))
    assistant = tail.removeprefix(after_user), between[: len(between) - len(before_user)]
    default, system = head[: len(head) - len(before_user)], None
    if template.takes_system:
        try:
            start, _, rest = render(("system", SYSTEM), user).partition(SYSTEM)
            system = start, rest.partition(ASKED)[0].removesuffix(before_user)
        except UserError:
            pass
    frame = Frame(system, (before_user, after_user), assistant, default)
    turns = [("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "Four"), ("user", "Five?")]
    for those in (turns, turns[:1], *([[("system", "Zero"), *turns]] if system else [])):
        try:
            if render(*those) != frame.render([{"role": role, "content": content} for role, content in those]):
                return None
        except UserError:
            return None
    return None if "{{" in "".join([default, *before_user, *after_user, *assistant, *(system or ())]) else frame


def write_modelfile(
    path: Path, gguf: Path, *, tokenizer: Any = None, stops: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> None:
    """Write the Modelfile of a whole model, or without a tokenizer that of an adapter.

    Args:
        gguf: the GGUF file, beside it.
        stops: texts that end an answer.
        settings: the model's generation_config.json.
    """
    lines = [f"# ollama create {gguf.stem} -f {path.name}"]
    if tokenizer is None:
        lines += ["# The base model, as a GGUF file or by its name in Ollama:", "FROM ./base.gguf", f"ADAPTER ./{gguf.name}"]
    else:
        lines += [f"FROM ./{gguf.name}"]
        frame = frame_of(tokenizer)
        if frame is not None and '"""' not in frame.go():
            lines += [f'TEMPLATE """{frame.go()}"""']
        elif tokenizer.chat_template:
            lines += ["# Ollama has no such template as this model's; it takes the most similar of its own."]
        lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stops]
        given = settings or {}
        chosen = {ours: given.get(name) for name, ours in SAMPLING.items()} if given.get("do_sample") else {"temperature": 0}
        lines += [f"PARAMETER {name} {value}" for name, value in chosen.items() if value is not None]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
