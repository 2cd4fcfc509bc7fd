"""A conversation with a model: answers come piece by piece, and the cache keeps what was said."""

from collections.abc import Iterator

from ftjax.data.example import Message
from ftjax.errors import UserError
from ftjax.generate.engine import Memory
from ftjax.generate.sample import Sampling
from ftjax.generate.session import Generator
from ftjax.generate.text import StopStrings

CHUNK = 4  # tokens between two pieces of text


class Conversation:
    """Asks and remembers.

    Attributes:
        messages: what was said, `[{"role": ..., "content": ...}, ...]`.
        tokens: ids that the last answer took.
    """

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling | None = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        stop: tuple[str, ...] = (),
        seed: int = 0,
    ):
        """Raises UserError where the tokenizer has no chat template."""
        if not generator.tokenizer.chat_template:
            raise UserError(
                "this tokenizer has no chat template, so that it cannot be told what a conversation looks like to the model; "
                "give one as --chat-template (a Jinja template, or the path of a .jinja file), or use `ftjax generate`"
            )
        self.generator, self.sampling = generator, sampling or Sampling()
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.tokens = 0
        self._stops = StopStrings(stop)
        self._memory = Memory()
        self._asked = 0
        self.system(system)

    def system(self, text: str | None) -> None:
        """Begin anew, with this system message or none."""
        self.messages: list[Message] = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        """Begin anew; the system message stays."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def ask(self, text: str) -> Iterator[str]:
        """The answer in pieces. An iterator that is closed early, or interrupted, leaves what was said so far.

        Raises UserError where the conversation no longer fits into the model's context; the question is then not kept.
        """
        generator, rows = self.generator, self.generator.engine.shards
        question = {"role": "user", "content": text}
        prompt = generator.encode([*self.messages, question])
        answer = generator.begin(prompt, self.max_new_tokens, self._stops)
        rules = generator.engine.rules(
            self.sampling, self.seed, [self._asked], [answer], generator.ends_with(self._stops), rows
        )
        self._asked += 1
        self.messages.append(question)
        said = ""
        try:
            steps = generator.engine.answer(generator.params, [answer], rows, rules, chunk=CHUNK, memory=self._memory)
            for _ in steps:
                if piece := answer.piece():
                    said += piece
                    yield piece
        finally:
            self.tokens = len(answer.tokens)
            self.messages.append({"role": "assistant", "content": said})
