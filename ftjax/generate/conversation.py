"""A conversation with a model: answers come piece by piece, and the cache keeps what was said."""

from collections.abc import Iterator
from dataclasses import replace

from ftjax.data.example import Message
from ftjax.errors import UserError
from ftjax.generate.cache import bucket
from ftjax.generate.engine import Batch
from ftjax.generate.finite import not_finite
from ftjax.generate.request import Request
from ftjax.generate.session import Generator

CHUNK = 4  # tokens between two pieces of text
SMALLEST = 1024  # slots of a conversation's cache


class Conversation:
    """Asks and remembers.

    Attributes:
        messages: what was said, `[{"role": ..., "content": ...}, ...]`.
        tokens: ids that the last answer took.
    """

    def __init__(self, generator: Generator, request: Request, *, system: str | None = None):
        """
        Args:
            request: whose settings every answer has.

        Raises UserError where the tokenizer has no chat template.
        """
        if not generator.tokenizer.chat_template:
            raise UserError(
                "this tokenizer has no chat template, so that it cannot be told what a conversation looks like to the model; "
                "give one as --chat-template (a Jinja template, or the path of a .jinja file), or use `ftjax generate`"
            )
        self.generator, self.request = generator, request
        self.tokens = 0
        self._batch: Batch | None = None
        self._asked = 0
        self.system(system)

    def system(self, text: str | None) -> None:
        """Begin anew, with this system message or none."""
        self.messages: list[Message] = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        """Begin anew; the system message stays."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def undo(self) -> str | None:
        """Forget the last question and its answer; the question comes back, or None where there is none."""
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return question

    def ask(self, text: str) -> Iterator[str]:
        """The answer in pieces. An iterator that is closed early, or interrupted, leaves what was said so far.

        Raises UserError where the conversation no longer fits into the model's context, or the model gives no probabilities;
        the question is then not kept.
        """
        generator = self.generator
        question = {"role": "user", "content": text}
        answer = generator.begin(replace(self.request, prompt=[*self.messages, question], number=self._asked))
        self._asked += 1
        self.messages.append(question)
        said = ""
        try:
            batch = self._batch_for(len(answer.prompt) + answer.limit)
            batch.start({0: answer})
            while True:
                if piece := answer.piece():
                    said += piece
                    yield piece
                if answer.finish:
                    break
                batch.step(CHUNK)
        finally:
            self.tokens = len(answer.tokens)
            if answer.finish == "error":
                self.messages.pop()
            else:
                self.messages.append({"role": "assistant", "content": said})
        if answer.finish == "error":
            raise not_finite("the answer", generator.model, generator.params)

    def _batch_for(self, tokens: int) -> Batch:
        """The one that remembers the last turns, or a larger one."""
        generator, slots = self.generator, SMALLEST
        while slots < bucket(tokens, 16):
            slots *= 2
        if self._batch is None or self._batch.slots < slots or self._batch.params is not generator.params:
            self._batch = Batch(generator.engine, generator.params, generator.engine.shards, slots)
        return self._batch
