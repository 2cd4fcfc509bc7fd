"""A model that answers: `Generator` turns prompts into texts, in batches, on whatever devices the weights lie on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax.config import MeshConfig, ModelConfig
from ftjax.data.example import Example, Message
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
from ftjax.generate.sample import Sampling
from ftjax.generate.score import Query, Score, arrays, completion_ids
from ftjax.generate.text import StopStrings, TextStream
from ftjax.hub.tokenizer import load_tokenizer
from ftjax.mesh import make_mesh
from ftjax.models.classifier import classes_of
from ftjax.models.model import Model

log = logging.getLogger(__name__)

Prompt = str | Sequence[Message] | Sequence[int] | Example
CHUNK_WITH_STOPS = 8  # tokens between two looks of the host, which finds stop strings
BATCH_SIZE = 32


class Generator:
    """Answers prompts with one model. Programs are compiled once for each shape, and shapes are few.

    With several processes each must make the same calls.

    Attributes:
        model, params: what runs. `params` may be replaced between calls, so that a model in training can be watched.
        settings: generation_config.json of the model.
        context: the most tokens that prompt and answer may have together.
        ends: ids that end an answer.
    """

    def __init__(
        self, model_path: str, adapter: str | Path | None = None, *, revision: str | None = None, dtype: str = "auto",
        mesh: Mesh | None = None, tokenizer: Any = None, chat_template: str | None = None, merge: bool = True,
        quantization: str | None = None,
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
        self.context, self.ends = model.sizes.positions, end_ids(model.config, self.settings, tokenizer)
        if model.max_positions is not None:  # virtual tokens take some of them
            self.context = min(self.context, model.max_positions)

    # ---- what is called ----

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 256, temperature: float = 0.0, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0, stop: Sequence[str] = (),
        seed: int = 0, batch_size: int = BATCH_SIZE, logprobs: bool = False, chat: bool | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:  # fmt: skip
        """An answer to each prompt, in their order.

        A prompt is a text, a list of messages, an `Example` of data (its prompt), or token ids; all but the last become what
        training saw (`ftjax.data.template.render_prompt`). An answer depends on its prompt, the settings, the seed and its
        number among the prompts; not on the batch that it happens to be in.

        Args:
            max_new_tokens: the longest answer; shorter where the model's context ends.
            temperature: 0 is greedy decoding. This and the next four: see `Sampling`.
            stop: strings that end an answer and are not part of it.
            batch_size: prompts that are answered at a time.
            logprobs: give log-probabilities too.
            chat: whether a text is a user's message in the chat template; None: where the tokenizer has one.
            progress: called with the number of finished answers and of tokens so far.

        Raises UserError for settings out of range, an empty prompt, or one that does not fit into the model's context, and
        NotFinite where the model gives no probabilities.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if max_new_tokens < 1 or batch_size < 1:
            raise UserError(f"max_new_tokens = {max_new_tokens}, batch_size = {batch_size}; both must be at least 1")
        stops = StopStrings([stop] if isinstance(stop, str) else stop)
        ids = [self.encode(prompt, number, chat) for number, prompt in enumerate(prompts)]
        answers = [
            self.begin(prompt, max_new_tokens, stops, sampling=sampling, seed=seed, number=number)
            for number, prompt in enumerate(ids)
        ]
        short = [answer.limit for answer in answers if answer.limit < max_new_tokens]
        if short:
            log.warning(
                "max_new_tokens = %d is more than fits: prompt and answer may have %d tokens together, so that %d answer(s) "
                "can be %d tokens at most", max_new_tokens, self.context, len(short), min(short),
            )  # fmt: skip
        batches, rows = groups([len(prompt) for prompt in ids], batch_size, self.engine.shards)
        for numbers in batches:
            group = [answers[number] for number in numbers]
            slots = bucket(max(len(a.prompt) for a in group), 16) + bucket(max(a.limit for a in group), 16)
            batch = Batch(self.engine, self.params, rows, slots)
            batch.start(dict(enumerate(group)))
            while True:
                if broken := [number for number in numbers if answers[number].finish == "error"]:
                    raise not_finite(f"prompt {broken[0] + 1}", self.model, self.params)
                if progress:
                    progress(sum(a.finish is not None for a in answers), sum(len(a.tokens) for a in answers))
                if not batch.active:
                    break
                batch.step(CHUNK_WITH_STOPS if stops.strings else CHUNK)
        return [answer.generation(logprobs) for answer in answers]

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

    def encode(self, prompt: Prompt, number: int = 0, chat: bool | None = None) -> list[int]:
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
            ids = render_prompt(prompt, self.tokenizer, chat=chat)
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

    def begin(self, prompt: list[int], max_new_tokens: int, stops: StopStrings, **options: Any) -> Answer:
        """An answer without a token yet, whose length the context limits; `options` are those of `Answer`."""
        limit = min(max_new_tokens, self.context - len(prompt))
        return Answer(prompt, limit, self.ends_with(stops), stops, TextStream(self.tokenizer, prompt), **options)

    def ends_with(self, stops: StopStrings) -> frozenset[int]:
        """Ids that end an answer, stop strings included that are a token of their own, which may not show in a text."""
        known = self.tokenizer.get_added_vocab() if stops.strings else {}
        return self.ends | {known[string] for string in stops.strings if string in known}


def _with_adapters_tokenizer(settings: ModelConfig, adapter: str | Path | None) -> ModelConfig:
    """An adapter folder that brings a tokenizer means that one: it may have a chat template that the base lacks."""
    if settings.tokenizer is None and adapter and (Path(adapter) / "tokenizer_config.json").is_file():
        return settings.model_copy(update={"tokenizer": str(adapter)})
    return settings
