"""Hold a conversation with a model: stream answers and keep earlier turns in the cache."""

from collections.abc import Iterator
from dataclasses import replace

from ftjax.data.example import Message
from ftjax.errors import UserError
from ftjax.generate.answer import Answer
from ftjax.generate.finite import not_finite
from ftjax.generate.offline import for_conversation
from ftjax.generate.request import Request
from ftjax.generate.scheduler import Job, Scheduler
from ftjax.generate.session import Generator

CHUNK = 4  # tokens per streamed piece of text


class Conversation:
    """Sends messages to a model and keeps the history.

    Attributes:
        messages: the history, `[{"role": ..., "content": ...}, ...]`.
        tokens: number of tokens in the last answer.
    """

    def __init__(self, generator: Generator, request: Request, *, system: str | None = None):
        """
        Args:
            request: settings for every answer.

        Raises UserError if the tokenizer has no chat template.
        """
        if not generator.tokenizer.chat_template:
            raise UserError(
                "this tokenizer has no chat template, which a conversation needs; give one as --chat-template "
                "(a Jinja template, or the path of a .jinja file), or use `ftjax generate`"
            )
        self.generator, self.request = generator, request
        self.tokens = 0
        self._scheduler: Scheduler | None = None
        self._asked = 0
        self.system(system)

    def system(self, text: str | None) -> None:
        """Start over, with this system message or none."""
        self.messages: list[Message] = [{"role": "system", "content": text}] if text else []

    def reset(self) -> None:
        """Start over, keeping the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def undo(self) -> str | None:
        """Remove the last question and its answer; return the question, or None if there is none."""
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return question

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece. If the iterator is closed early or interrupted, the partial answer is kept.

        Raises UserError if the conversation no longer fits into the model's context, and NotFinite if the logits are not
        finite; the question is then not kept.
        """
        generator = self.generator
        question = {"role": "user", "content": text}
        answer = generator.begin(replace(self.request, prompt=[*self.messages, question], number=self._asked))
        self._asked += 1
        self.messages.append(question)
        said = ""
        try:
            scheduler = self._scheduler_for(answer)
            job = Job(answer)
            scheduler.submit(job)
            while not job.ended:
                scheduler.step()
                if piece := answer.piece():
                    said += piece
                    yield piece
        except GeneratorExit:  # the pages of what was said stay
            scheduler.cancel(job)
            raise
        except BaseException:  # what the devices hold is not known
            self._scheduler = None
            raise
        finally:
            self.tokens = len(answer.tokens)
            if answer.finish == "error":
                self.messages.pop()
            else:
                self.messages.append({"role": "assistant", "content": said})
        if answer.finish == "error":
            raise not_finite("the answer", generator.model, generator.params)

    def _scheduler_for(self, answer: Answer) -> Scheduler:
        """Return the scheduler whose pages have the earlier turns, or a new one if they are too few or of other parameters."""
        generator, found = self.generator, self._scheduler
        if found is None or not found.fits(len(answer.prompt) + answer.limit) or found.batch.params is not generator.params:
            self._scheduler = None  # its pages go before there are new ones
            self._scheduler = for_conversation(generator.engine, generator.params, answer, CHUNK)
        return self._scheduler
