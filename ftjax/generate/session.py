"""`Generator`: generate answers to prompts in batches, on the devices that hold the weights."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

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
from ftjax.generate.embed import Pooling
from ftjax.generate.engine import Engine
from ftjax.generate.finite import not_finite, require_finite
from ftjax.generate.load import choose_dtype, load
from ftjax.generate.offline import CHUNK, answer_all, stream_all
from ftjax.generate.request import Piece, Prompt, Request
from ftjax.generate.score import Query, Score, arrays, completion_ids
from ftjax.generate.text import StopStrings, TextStream
from ftjax.hub.tokenizer.ends import end_ids, generation_config
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.mesh import make_mesh
from ftjax.models.classifier import classes_of
from ftjax.models.model import Model

log = logging.getLogger(__name__)

CHUNK_WITH_STOPS = 8  # tokens per decode call if there are stop strings, which the host checks
CHUNK_OF_A_STREAM = 4  # tokens per streamed piece
BATCH_SIZE = 32


class Generator:
    """Answers prompts with one model. Programs are compiled once per shape; sizes are bucketed to keep shapes few.

    With several processes, each must make the same calls.

    Attributes:
        model, params: the model and its parameters. `params` may be replaced between calls, to sample during training.
        settings: generation_config.json of the model.
        context: maximum number of tokens of prompt and answer together.
        ends: token ids that end an answer.
        special_tokens_in_text, fold_system: how texts and messages are rendered with the chat template (`render_prompt`).
    """

    def __init__(
        self, model_path: str, adapter: str | Path | None = None, *, revision: str | None = None, dtype: str = "auto",
        mesh: Mesh | None = None, tokenizer: Any = None, chat_template: str | None = None, merge: bool = True,
        quantization: str | None = None, special_tokens_in_text: Mode | None = None, fold_system: bool | None = None,
    ):  # fmt: skip
        """Load a model and optionally an adapter.

        Args:
            model_path: Hub id, local folder or .gguf file.
            adapter: a PEFT folder.
            dtype: dtype of weights, activations and cache: `auto`, `float32`, `bfloat16` or `float16`.
            mesh: None uses one device.
            tokenizer: a tokenizer, or the folder or Hub id of one; None uses the model's own.
            chat_template: a Jinja template, or the path of a .jinja file; None uses the tokenizer's own.
            merge: merge the adapter into the weights, which is faster; False keeps it unmerged.
            special_tokens_in_text, fold_system: how texts and messages are rendered; None uses the defaults of `data`.
            quantization: `int8` or `nf4`: quantise the weights of dense layers, and keep the adapter unmerged.

        Raises UserError if anything is missing, damaged or not supported.
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
        source: Path | None = None, of_sampler: bool = False,
    ) -> "Generator":  # fmt: skip
        """Create a generator from a model in memory, such as one in training.

        Args:
            params: all parameters, frozen and trained, as they are placed on the mesh.
            dtype: dtype of activations and cache.
            source: the base model's folder, for its generation_config.json.
            of_sampler: log-probabilities of answers are those that tokens were drawn with, after temperature and filters.
        """
        self = cls.__new__(cls)
        self._set_up(model, params, tokenizer, mesh, jnp.dtype(dtype), source, of_sampler)
        return self

    def _set_up(self, model, params, tokenizer, mesh: Mesh, dtype: Any, source: Path | None, of_sampler: bool = False) -> None:
        self.model, self.params, self.tokenizer = model, dict(params), tokenizer
        self.engine = Engine(model, mesh, dtype, of_sampler)
        self.settings = generation_config(source)
        self.special_tokens_in_text: Mode = "split"
        self.fold_system = True
        self.context, self.ends = model.sizes.positions, end_ids(model.config, self.settings, tokenizer)
        if model.max_positions is not None:  # virtual tokens use some positions
            self.context = min(self.context, model.max_positions)

    # ---- public methods ----

    def generate(
        self, prompts: Sequence[Prompt], *, batch_size: int = BATCH_SIZE, logprobs: bool = False,
        progress: Callable[[int, int], None] | None = None, **settings: Any,
    ) -> list[Generation]:  # fmt: skip
        """Answer all prompts, in order, with the same `settings` (see `Request.of`).

        Other arguments and errors are those of `answer`.
        """
        requests = [Request.of(prompt, number=number, **settings) for number, prompt in enumerate(prompts)]
        return self.answer(requests, batch_size=batch_size, logprobs=logprobs, progress=progress)

    def answer(
        self, requests: Sequence[Request], *, batch_size: int = BATCH_SIZE, logprobs: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:  # fmt: skip
        """Answer requests, in order. An answer depends only on its request, not on the batch that it is in.

        Args:
            batch_size: the most requests that run at the same time.
            logprobs: also return log-probabilities.
            progress: called with the number of finished answers and the number of tokens so far.

        Raises UserError for settings out of range, an empty prompt, or one that does not fit into the model's context, and
        NotFinite if the logits are not finite.
        """
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size}; expected at least 1")
        answers = [self.begin(request, index) for index, request in enumerate(requests)]
        self._warn_of_limits(answers, requests)
        steps = CHUNK_WITH_STOPS if any(request.stop for request in requests) else CHUNK
        finished = 0
        for ended in answer_all(self.engine, self.params, answers, batch_size, steps):
            for number in sorted(ended):
                self._require_finite(answers[number], number)
            finished += len(ended)
            if progress:
                progress(finished, sum(len(a.tokens) for a in answers))
        return [answer.generation(logprobs) for answer in answers]

    def stream(
        self, requests: Iterable[Request], *, rows: int = 8, slots: int | None = None, steps: int = CHUNK_OF_A_STREAM
    ) -> Iterator[Piece]:
        """Answer requests with continuous batching and yield each answer piece by piece.

        A request takes a row as soon as one is free, while the others continue; `requests` is only advanced when a row is
        free. Several processes must pass the same requests.

        Args:
            rows: number of requests in flight; rounded up to a multiple of the devices that rows are sharded over.
            slots: maximum number of tokens of prompt and answer; None takes it from the first `rows` requests. A request that
                needs more waits until all others have ended, and then gets a larger cache.
            steps: tokens per piece.

        Raises UserError and NotFinite as `answer` does; pieces yielded before that remain valid.
        """
        coming = ((index, self.begin(request, index)) for index, request in enumerate(requests))
        for index, answer in stream_all(self.engine, self.params, coming, rows, slots or 0, steps):
            self._require_finite(answer, index)
            yield Piece(index, *answer.news(), answer.finish)

    def _require_finite(self, answer: Answer, index: int) -> None:
        if answer.finish == "error":
            raise not_finite(f"prompt {index + 1}", self.model, self.params)

    def _warn_of_limits(self, answers: Sequence[Answer], requests: Sequence[Request]) -> None:
        short = [a.limit for a, request in zip(answers, requests, strict=True) if a.limit < request.max_new_tokens]
        if short:
            log.warning(
                "max_new_tokens exceeds the context: prompt and answer may have %d tokens together, so %d answer(s) "
                "are limited, the shortest to %d tokens", self.context, len(short), min(short),
            )  # fmt: skip

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]], *, batch_size: int = BATCH_SIZE,
        temperature: float = 1.0, chat: bool | None = None, progress: Callable[[int], None] | None = None,
    ) -> list[Score]:  # fmt: skip
        """Return the log-likelihood of each completion given its prompt, token by token; no EOS token is added.

        Args:
            completions: texts (tokenised by `ftjax.generate.score.completion_ids`) or token ids.
            temperature: divides the logits.
            chat: whether to render a text with the chat template; None: if the tokenizer has one.
            progress: called with the number of scored completions so far.

        Raises UserError for an empty completion or a text that does not fit into the model's context, and NotFinite if the
        logits are not finite.
        """
        pairs = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids = self.encode(prompt, number, chat)
            pairs.append((ids, completion_ids(prompt, ids, completion, self.tokenizer, chat)))
            size = len(ids) + len(pairs[-1][1])
            if size == len(ids) or size > self.context:
                problem = "is empty" if size == len(ids) else f"ends at token {size}, and the model's context is {self.context}"
                raise UserError(f"completion {number + 1} {problem}")
        batches, rows = groups([len(prompt) + len(completion) for prompt, completion in pairs], batch_size, self.engine.shards)
        found: dict[int, Score] = {}
        for batch in batches:
            logprobs, greedy = self.engine.score(
                self.params, *arrays([Query.of(*pairs[i]) for i in batch], rows), temperature=temperature
            )
            for row, i in enumerate(batch):
                tokens = pairs[i][1]
                values = logprobs[row, : len(tokens)]
                require_finite(values, f"completion {i + 1}", self.model, self.params)
                found[i] = Score(tokens, values.tolist(), bool(greedy[row, : len(tokens)].all()))
            if progress:
                progress(len(found))
        return [found[i] for i in range(len(pairs))]

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, pooling: Pooling = "last", batch_size: int = BATCH_SIZE
    ) -> np.ndarray:
        """Return an embedding of each text, float32 `[N, E]`, without the chat template.

        Args:
            texts: texts, or token ids.
            pooling: the last hidden state (`last`), or the mean of all (`mean`).

        Raises UserError as `answer` does and for another pooling, and NotFinite if a hidden state is not finite.
        """
        if pooling not in get_args(Pooling):
            raise UserError(f"pooling = {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
        ids = [self.encode(text, number, chat=False) for number, text in enumerate(texts)]
        batches, rows = groups([len(one) for one in ids], batch_size, self.engine.shards)
        found = np.zeros((len(ids), self.model.sizes.embed), np.float32)
        for batch in batches:
            tokens, segments, *_ = arrays([Query(ids[i], [0], [0]) for i in batch], rows)
            found[batch] = self.engine.embed(self.params, tokens, segments, pooling=pooling)[: len(batch)]
            require_finite(found[batch], "a text", self.model, self.params)
        return found

    def encode(
        self, prompt: Prompt, number: int = 0, chat: bool | None = None, tools: list[Any] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """Return the token ids of a prompt; `number` is used in error messages.

        Raises UserError if there are none, too many, or some outside the vocabulary, and for a classification model.
        """
        if classes_of(self.model.config):
            raise UserError("the model has a classification head and generates no text; use ftjax evaluate for its predictions")
        if isinstance(prompt, Example):
            ids = example_prompt(prompt, self.tokenizer)
            if ids is None:
                raise UserError(
                    f"{prompt.where}: it has no prompt, so there is nothing to answer; give it one or remove the row"
                )
        elif not isinstance(prompt, str | Sequence | np.ndarray):
            raise UserError(f"prompt {number + 1} is {type(prompt).__name__}; expected a text, messages or token ids")
        elif not isinstance(prompt, str) and all(isinstance(token, int | np.integer) for token in prompt):
            ids = [int(token) for token in prompt]
        else:
            ids = render_prompt(
                prompt, self.tokenizer, chat=chat, tools=tools, template_arguments=template_arguments,
                special_tokens_in_text=self.special_tokens_in_text, fold_system=self.fold_system,
            )  # fmt: skip
        if not ids:
            raise UserError(f"prompt {number + 1} is empty, and this tokenizer adds no BOS token; give at least one word")
        vocab = self.model.sizes.vocab
        if not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(i for i in ids if not 0 <= i < vocab)
            raise UserError(
                f"prompt {number + 1} has the token {wrong}, and the model's are 0 to {vocab - 1}; use its own tokenizer"
            )
        if len(ids) >= self.context:
            raise UserError(
                f"prompt {number + 1} has {len(ids)} tokens, and the model's context is {self.context}, answer included; "
                "shorten the prompt, or use a model with a longer context"
            )
        return ids

    def begin(self, request: Request, index: int = 0, *, shows_special: bool = False) -> Answer:
        """Return a new, empty answer, its length limited by the context; `index` is used in error messages.

        Args:
            shows_special: its text shows special tokens, as the marks of some families' calls of functions are.
        """
        prompt = self.encode(request.prompt, index, request.chat, request.tools, request.template_arguments)
        stops, limit = StopStrings(request.stop), min(request.max_new_tokens, self.context - len(prompt))
        stream = TextStream(self.tokenizer, prompt, skip_special_tokens=not shows_special)
        return Answer(
            prompt, limit, self.ends_with(stops), stops, stream, sampling=request.sampling, seed=request.seed,
            number=request.number, bias=request.logit_bias,
        )  # fmt: skip

    def ends_with(self, stops: StopStrings) -> frozenset[int]:
        """Return the token ids that end an answer, including added tokens that are stop strings: text may not show these."""
        known = self.tokenizer.get_added_vocab() if stops.strings else {}
        return self.ends | {known[string] for string in stops.strings if string in known}


def _with_adapters_tokenizer(settings: ModelConfig, adapter: str | Path | None) -> ModelConfig:
    """Use the tokenizer in the adapter folder, if there is one: it may have a chat template that the base model lacks."""
    if settings.tokenizer is None and adapter and (Path(adapter) / "tokenizer_config.json").is_file():
        return settings.model_copy(update={"tokenizer": str(adapter)})
    return settings
