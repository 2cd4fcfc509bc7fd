"""One training example, independent of its file format."""

from dataclasses import dataclass, replace
from typing import Any, Literal

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """The content of one row to train on.

    One of these is set: `text` (all of it is trained); `input_ids` with `labels`; `messages`; or a prompt that is text, as
    both `prompt` with `completion` and `messages`: which of the two the model sees depends on `prompt_format` and on whether
    the tokenizer has a chat template.

    `{"instruction": "Add.", "input": "2 3", "output": "5"}` becomes
    `Example(prompt="### Instruction:\\nAdd.\\n\\n### Input:\\n2 3\\n\\n### Response:\\n", completion="5",
    messages=({"role": "user", "content": "Add.\\n\\n2 3"}, {"role": "assistant", "content": "5"}), references=("5",))`.
    """

    where: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] | None = None
    prompt_turns: int | None = None  # the first so many messages are the prompt, and the rest is trained; None: roles decide
    references: tuple[str, ...] = ()  # reference answers for evaluation
    rejected: "Example | None" = None  # the same prompt with the rejected answer of a preference
    wanted: bool = True  # False: an unpaired preference (KTO) labels the answer as bad
    labelled: bool = False  # the row says itself whether the answer is wanted
    margin: float | None = None  # by how much the chosen answer of a preference is better
    tools: list[Any] | None = None
    template_arguments: dict[str, Any] | None = None
    input_ids: list[int] | None = None
    labels: list[int] | None = None
    prompt_format: Literal["auto", "chat", "raw"] = "auto"
    special_tokens_in_text: Literal["encode", "split", "error"] = "split"  # control tokens that a message spells
    fold_system: bool = True  # move it into the first user message if the template takes none
    source: int = 0  # index of the source in a mixture

    def is_chat(self, tokenizer: Any) -> bool:
        """Return whether the model sees this example through the chat template."""
        if self.messages is None:
            return False
        if self.prompt is None:
            return True
        return self.prompt_format == "chat" or (self.prompt_format == "auto" and bool(tokenizer.chat_template))

    def question(self, tokenizer: Any) -> str | tuple[Message, ...] | None:
        """Return the text before the answer, or messages if the model sees the chat template; None if there is no prompt."""
        if not self.is_chat(tokenizer):
            return self.prompt
        if self.prompt_turns is not None:
            return self.messages[: self.prompt_turns]
        last = max((n for n, message in enumerate(self.messages) if message["role"] == "assistant"), default=len(self.messages))
        return self.messages[:last]

    def with_source(
        self, source: int, prompt_format: str, special_tokens_in_text: str = "split", fold_system: bool = True
    ) -> "Example":
        """Return the example with the settings of its source, which its rejected answer gets, too."""
        how = (source, prompt_format, special_tokens_in_text, fold_system)
        return replace(
            self, source=source, prompt_format=prompt_format, special_tokens_in_text=special_tokens_in_text,
            fold_system=fold_system, rejected=None if self.rejected is None else self.rejected.with_source(*how),
        )  # fmt: skip
