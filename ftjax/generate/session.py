"""A model that answers: `Generator` turns prompts into texts, in batches, on whatever devices the weights lie on."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax.config import MeshConfig, ModelConfig
from ftjax.data.control import Mode
from ftjax.data.example import Example
from ftjax.data.template import example_prompt, render_prompt
from ftjax.errors import UserError
from ftjax.generate.answer import Answer, Generation
from ftjax.generate.batch import groups
from ftjax.generate.cache import bucket
from ftjax.generate.context import end_ids, generation_config
from ftjax.generate.decode import CHUNK
from ftjax.generate.engine import Batch, Engine
from ftjax.generate.finite import not_finite, require_finite
from ftjax.generate.load import choose_dtype, load
from ftjax.generate.request import Piece, Prompt, Request
from ftjax.generate.score import Query, Score, arrays, completion_ids
from ftjax.generate.text import StopStrings, TextStream
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.mesh import make_mesh
from ftjax.models.classifier import classes_of
from ftjax.models.model import Model

log = logging.getLogger(__name__)

CHUNK_WITH_STOPS = 8  # tokens between two looks of the host, which finds stop strings
CHUNK_OF_A_STREAM = 4  # tokens between two pieces of an answer
BATCH_SIZE = 32


class Generator:
    """Answers prompts with one model. Programs are compiled once for each shape, and shapes are few.

    With several processes each must make the same calls.

    Attributes:
        model, params: what runs. `params` may be replaced between calls, so that a model in training can be watched.
        settings: generation_config.json of the model.
        context: the most tokens that prompt and answer may have together.
        ends: ids that end an answer.
        special_tokens_in_text, fold_system: how prompts that are texts or messages meet the chat template (`render_prompt`).
    """

    def __init__(
        self, model_path: str, adapter: str | Path | None = None, *, revision: str | None = None, dtype: str = "auto",
        mesh: Mesh | None = None, tokenizer: Any = None, chat_template: str | None = None, merge: bool = True,
        quantization: str | None = None, special_tokens_in_text: Mode | None = None, fold_system: bool | None = None,
    ):  # fmt: skip
        """Load a model and, where one is given, an adapter.

        Args:
            model_path: Hub id, local folder or .gguf file.
            adapter: a PEFT folder.
            dtype: of weights, activations and cache: `auto`, `float32`, `bfloat16` or `float16`.
            mesh: None takes one device.
            tokenizer: where it is not the model's own: one that is loaded, or the folder or Hub id of one.
            chat_template: where it is not the tokenizer's own: a Jinja template, or the path of a .jinja file.
            merge: add the adapter to the weights, which is faster; false keeps it apart.
            special_tokens_in_text, fold_system: of prompts that are texts or messages; None: `data`'s defaults.
            quantization: `int8` or `nf4`: hold the dense layers' weights in few bits, and the adapter apart.

        Raises UserError where something is missing, damaged or not supported.
        """
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
        kind = choose_dtype(dtype)
        loaded = load(
            model_path, Path(adapter) if adapter else None, mesh, kind, revision=revision, merge=merge,
            quantization=quantization,
        )  # fmt: skip
        if tokenizer is None or isinstance(tokenizer, str):
            settings = ModelConfig(path=model_path, revision=revision, tokenizer=tokenizer, chat_template=chat_template)
            tokenizer = load_tokenizer(_with_adapters_tokenizer(settings, adapter))
        self._set_up(loaded.model, loaded.params, tokenizer, mesh, kind, loaded.path)
        self.special_tokens_in_text = special_tokens_in_text or "split"
        self.fold_system = fold_system is not False

    @classmethod
    def of(
        cls, model: Model, params: Mapping[str, jax.Array], tokenizer: Any, *, mesh: Mesh, dtype: Any,
        source: Path | None = None,
    ) -> "Generator":  # fmt: skip
        """From a model that is already there, such as one in training.

        Args:
            params: all of them, frozen and trained, as they lie on the mesh.
            dtype: of activations and cache.
            source: the base model's folder, for its generation_config.json.
        """
        self = cls.__new__(cls)
        self._set_up(model, params, tokenizer, mesh, jnp.dtype(dtype), source)
        return self

    def _set_up(self, model, params, tokenizer, mesh: Mesh, dtype: Any, source: Path | None) -> None:
        self.model, self.params, self.tokenizer = model, dict(params), tokenizer
        self.engine = Engine(model, mesh, dtype)
        self.settings = generation_config(source)
        self.special_tokens_in_text: Mode = "split"
        self.fold_system = True
        self.context, self.ends = model.sizes.positions, end_ids(model.config, self.settings, tokenizer)
        if model.max_positions is not None:  # virtual tokens take some of them
            self.context = min(self.context, model.max_positions)

    # ---- what is called ----

    def generate(
        self, prompts: Sequence[Prompt], *, batch_size: int = BATCH_SIZE, logprobs: bool = False,
        progress: Callable[[int, int], None] | None = None, **settings: Any,
    ) -> list[Generation]:  # fmt: skip
        """Answers each prompt, all with the same `settings` (those of `Request.of`), in their order.

        Arguments and errors are those of `answer`.
        """
        requests = [Request.of(prompt, number=number, **settings) for number, prompt in enumerate(prompts)]
        return self.answer(requests, batch_size=batch_size, logprobs=logprobs, progress=progress)

    def answer(
        self, requests: Sequence[Request], *, batch_size: int = BATCH_SIZE, logprobs: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:  # fmt: skip
        """Answers requests, in their order. An answer depends on its request alone, not on the batch that it is in.

        Args:
            batch_size: requests that are answered at a time.
            logprobs: give log-probabilities too.
            progress: called with the number of finished answers and of tokens so far.

        Raises UserError for settings out of range, an empty prompt, or one that does not fit into the model's context, and
        NotFinite where the model gives no probabilities.
        """
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}; expected at least 1")
        answers = [self.begin(request, index) for index, request in enumerate(requests)]
        self._warn_of_limits(answers, requests)
        batches, rows = groups([len(answer.prompt) for answer in answers], batch_size, self.engine.shards)
        for numbers in batches:
            group = [answers[number] for number in numbers]
            slots = bucket(max(len(a.prompt) for a in group), 16) + bucket(max(a.limit for a in group), 16)
            batch = Batch(self.engine, self.params, rows, slots)
            batch.start(dict(enumerate(group)))
            steps = CHUNK_WITH_STOPS if any(requests[number].stop for number in numbers) else CHUNK
            while True:
                for number in numbers:
                    self._require_finite(answers[number], number)
                if progress:
                    progress(sum(a.finish is not None for a in answers), sum(len(a.tokens) for a in answers))
                if not batch.active:
                    break
                batch.step(steps)
        return [answer.generation(logprobs) for answer in answers]

    def stream(
        self, requests: Iterable[Request], *, rows: int = 8, slots: int | None = None, steps: int = CHUNK_OF_A_STREAM
    ) -> Iterator[Piece]:
        """Answers requests as they come, many at a time, and gives each answer piece by piece.

        A request takes a row as soon as one is free, while the others go on; the next one is asked for when there is a row
        for it. Several processes must have the same requests.

        Args:
            rows: requests that are answered at a time; rounded up to the devices that share them.
            slots: tokens of the longest prompt with its answer; None: of the first `rows` requests. A request that needs more
                waits until all others have ended, and a larger cache is made.
            steps: tokens between two pieces.

        Raises UserError and NotFinite as `answer` does; what was given until then stays valid.
        """
        rows = math.ceil(max(1, rows) / self.engine.shards) * self.engine.shards
        coming = ((index, self.begin(request, index)) for index, request in enumerate(requests))
        waiting = deque(islice(coming, rows))
        batch: Batch | None = None
        running: dict[int, tuple[int, Answer]] = {}  # by row
        while waiting or running:
            if not running and (batch is None or _slots(waiting[0][1]) > batch.slots):
                needed = max(_slots(answer) for _, answer in waiting)
                batch = Batch(self.engine, self.params, rows, max(needed, slots or 0))
            started = {}
            for row in (row for row in range(rows) if row not in running):
                waiting.extend(islice(coming, 0 if waiting else 1))
                if not waiting or _slots(waiting[0][1]) > batch.slots:
                    break
                started[row] = waiting.popleft()
            batch.start({row: answer for row, (_, answer) in started.items()})
            running |= started
            batch.step(steps)
            for row, (index, answer) in list(running.items()):
                self._require_finite(answer, index)
                yield Piece(index, *answer.news(), answer.finish)
                if answer.finish:
                    del running[row]
            if not running and not waiting:
                waiting.extend(islice(coming, 1))

    def _require_finite(self, answer: Answer, index: int) -> None:
        if answer.finish == "error":
            raise not_finite(f"prompt {index + 1}", self.model, self.params)

    def _warn_of_limits(self, answers: Sequence[Answer], requests: Sequence[Request]) -> None:
        short = [a.limit for a, request in zip(answers, requests, strict=True) if a.limit < request.max_new_tokens]
        if short:
            log.warning(
                "max_new_tokens is more than fits: prompt and answer may have %d tokens together, so that %d answer(s) "
                "can be %d tokens at most", self.context, len(short), min(short),
            )  # fmt: skip

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]], *, batch_size: int = BATCH_SIZE,
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:  # fmt: skip
        """The log-likelihood of each completion behind its prompt, token by token; no EOS is added.

        Args:
            completions: texts (tokenised as `ftjax.generate.score.completion_ids` says) or token ids.
            progress: called with the number of scored completions so far.

        Raises UserError for an empty completion, and for a text that does not fit into the model's context, and NotFinite
        where the model gives no probabilities.
        """
        pairs = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids = self.encode(prompt, number)
            pairs.append((ids, completion_ids(prompt, ids, completion, self.tokenizer)))
            size = len(ids) + len(pairs[-1][1])
            if size == len(ids) or size > self.context:
                problem = "is empty" if size == len(ids) else f"ends at token {size}, and the model's context is {self.context}"
                raise UserError(f"completion {number + 1} {problem}")
        batches, rows = groups([len(prompt) + len(completion) for prompt, completion in pairs], batch_size, self.engine.shards)
        found: dict[int, Score] = {}
        for batch in batches:
            logprobs, greedy = self.engine.score(self.params, *arrays([Query.of(*pairs[i]) for i in batch], rows))
            for row, i in enumerate(batch):
                tokens = pairs[i][1]
                values = logprobs[row, : len(tokens)]
                require_finite(values, f"completion {i + 1}", self.model, self.params)
                found[i] = Score(tokens, values.tolist(), bool(greedy[row, : len(tokens)].all()))
            if progress:
                progress(len(found))
        return [found[i] for i in range(len(pairs))]

    def encode(self, prompt: Prompt, number: int = 0, chat: bool | None = None, tools: list[Any] | None = None) -> list[int]:
        """The ids of a prompt; `number` is for messages.

        Raises UserError where there are none, too many, or some that the model does not have, and for a model that writes
        nothing.
        """
        if classes_of(self.model.config):
            raise UserError("the model has a classification head, which writes no answers; ftjax evaluate says what it finds")
        if isinstance(prompt, Example):
            ids = example_prompt(prompt, self.tokenizer)
            if ids is None:
                raise UserError(f"{prompt.where}: it has no prompt, so that there is nothing to answer")
        elif not isinstance(prompt, str) and all(isinstance(token, int | np.integer) for token in prompt):
            ids = [int(token) for token in prompt]
        else:
            ids = render_prompt(
                prompt, self.tokenizer, chat=chat, tools=tools, special_tokens_in_text=self.special_tokens_in_text,
                fold_system=self.fold_system,
            )  # fmt: skip
        if not ids:
            raise UserError(f"prompt {number + 1} is empty, and this tokenizer puts nothing before it; give at least a word")
        vocab = self.model.sizes.vocab
        if not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise UserError(
                f"prompt {number + 1} has the token {wrong}, and the model's are 0 to {vocab - 1}; is it another's?"
            )
        if len(ids) >= self.context:
            raise UserError(
                f"prompt {number + 1} has {len(ids)} tokens, and the model's context is {self.context}, answer included; "
                "shorten the prompt, or take a model with a longer context"
            )
        return ids

    def begin(self, request: Request, index: int = 0) -> Answer:
        """An answer without a token yet, whose length the context limits; `index` is for messages."""
        prompt = self.encode(request.prompt, index, request.chat, request.tools)
        stops, limit = StopStrings(request.stop), min(request.max_new_tokens, self.context - len(prompt))
        stream = TextStream(self.tokenizer, prompt)
        return Answer(
            prompt, limit, self.ends_with(stops), stops, stream, sampling=request.sampling, seed=request.seed,
            number=request.number,
        )  # fmt: skip

    def ends_with(self, stops: StopStrings) -> frozenset[int]:
        """Ids that end an answer, stop strings included that are a token of their own, which may not show in a text."""
        known = self.tokenizer.get_added_vocab() if stops.strings else {}
        return self.ends | {known[string] for string in stops.strings if string in known}


def _slots(answer: Answer) -> int:
    return bucket(len(answer.prompt), 16) + bucket(answer.limit, 16)


def _with_adapters_tokenizer(settings: ModelConfig, adapter: str | Path | None) -> ModelConfig:
    """An adapter folder that brings a tokenizer means that one: it may have a chat template that the base lacks."""
    if settings.tokenizer is None and adapter and (Path(adapter) / "tokenizer_config.json").is_file():
        return settings.model_copy(update={"tokenizer": str(adapter)})
    return settings
