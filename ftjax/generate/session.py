"""A model that answers: `Generator` turns prompts into texts, in batches, on whatever devices the weights lie on."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ftjax.config import MeshConfig, ModelConfig
from ftjax.data.formats import Message
from ftjax.data.template import render_prompt
from ftjax.errors import UserError
from ftjax.generate.answer import Answer, Generation
from ftjax.generate.batch import block_length, groups, left_padded
from ftjax.generate.cache import bucket, cache_shape
from ftjax.generate.context import context_length, end_ids, recomputes_at
from ftjax.generate.decode import Rules, Runner, View
from ftjax.generate.load import choose_dtype, load
from ftjax.generate.sample import Sampling
from ftjax.generate.score import Score, arrays, completion_ids, score_step
from ftjax.generate.text import StopStrings, TextStream
from ftjax.hub.tokenizer import load_tokenizer
from ftjax.mesh import make_mesh, spec
from ftjax.models.model import Model

log = logging.getLogger(__name__)

Prompt = str | Sequence[Message] | Sequence[int]
CHUNK, CHUNK_WITH_STOPS = 32, 8  # tokens between two looks of the host
BATCH_SIZE = 32


class Generator:
    """Answers prompts with one model. Programs are compiled once for each shape, and shapes are few.

    With several processes each must make the same calls.

    Attributes:
        model, params: what runs. `params` may be replaced between calls, so that a model in training can be watched.
        context: the most tokens that prompt and answer may have together.
        ends: ids that end an answer.
    """

    def __init__(
        self, model_path: str, adapter: str | Path | None = None, *, revision: str | None = None, dtype: str = "auto",
        mesh: Mesh | None = None, tokenizer: Any = None, merge: bool = True,
    ):  # fmt: skip
        """Load a model and, where one is given, an adapter.

        Args:
            model_path: Hub id, local folder or .gguf file.
            adapter: a PEFT folder.
            dtype: of weights, activations and cache: `auto`, `float32`, `bfloat16` or `float16`.
            mesh: None takes one device.
            tokenizer: where it is not the model's own: one that is loaded, or the folder or Hub id of one.
            merge: add the adapter to the weights, which is faster; false keeps it apart.

        Raises UserError where something is missing, damaged or not supported.
        """
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
        kind = choose_dtype(dtype)
        loaded = load(model_path, Path(adapter) if adapter else None, mesh, kind, revision=revision, merge=merge)
        if tokenizer is None or isinstance(tokenizer, str):
            settings = ModelConfig(path=model_path, revision=revision, tokenizer=tokenizer)
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

    def _set_up(self, model, params, tokenizer, mesh: Mesh, dtype, source: Path | None) -> None:
        self.model, self.params, self.tokenizer, self.mesh, self.dtype = model, dict(params), tokenizer, mesh, dtype
        self.context, self.ends = context_length(model.config), end_ids(model.config, source, tokenizer)
        self.shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.runner = Runner(model, cache_shape(model), dtype)
        self._prefill = jax.jit(self.runner.prefill, static_argnames=("slots", "longest", "block", "logprobs"))
        self._again = jax.jit(self.runner.again, static_argnames=("slots", "block"))
        self._decode = jax.jit(self.runner.decode, donate_argnums=1)
        self._score = jax.jit(partial(score_step, self.runner), out_shardings=NamedSharding(mesh, spec(())))

    # ---- what is called ----

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 256, temperature: float = 0.0, top_k: int | None = None,
        top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0, stop: Sequence[str] = (),
        seed: int = 0, batch_size: int = BATCH_SIZE, logprobs: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:  # fmt: skip
        """An answer to each prompt, in their order.

        A prompt is a text, a list of messages, or token ids; texts and messages become what training saw
        (`ftjax.data.template.render_prompt`). An answer depends on its prompt, the settings, the seed and its number among
        the prompts; not on the batch that it happens to be in.

        Args:
            max_new_tokens: the longest answer; shorter where the model's context ends.
            temperature: 0 is greedy decoding. This and the next four: see `Sampling`.
            stop: strings that end an answer and are not part of it.
            batch_size: prompts that are answered at a time.
            logprobs: give log-probabilities too.
            progress: called with the number of finished answers and of tokens so far.

        Raises UserError for settings out of range, an empty prompt, or one that does not fit into the model's context.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if max_new_tokens < 1 or batch_size < 1:
            raise UserError(f"max_new_tokens = {max_new_tokens}, batch_size = {batch_size}; both must be at least 1")
        ids = [self.encode(prompt, number) for number, prompt in enumerate(prompts)]
        limits = [min(max_new_tokens, self.context - len(prompt)) for prompt in ids]
        if any(limit < max_new_tokens for limit in limits):
            log.warning(
                "max_new_tokens = %d is more than fits: prompt and answer may have %d tokens together, so that %d answer(s) "
                "can be %d tokens at most", max_new_tokens, self.context, sum(n < max_new_tokens for n in limits), min(limits),
            )  # fmt: skip
        stops = StopStrings([stop] if isinstance(stop, str) else stop)
        ends = self.ends | self._stop_tokens(stops)
        rows = [Answer(i, limit, TextStream(self.tokenizer, i)) for i, limit in zip(ids, limits, strict=True)]
        batches, size = groups([len(prompt) for prompt in ids], batch_size, self.shards)
        found: dict[int, list[float]] = {}
        key = jax.random.key(seed)
        for batch in batches:
            numbers = np.zeros(size, np.uint32)
            numbers[: len(batch)] = batch
            rules = Rules(
                sampling.numbers(),
                jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers)),
                self._everywhere(np.array(sorted(ends) or [-1], np.int32)),
                self._place(np.array([limits[i] for i in batch] + [0] * (size - len(batch)), np.int32)),
            )

            def tell() -> None:
                if progress:
                    progress(sum(row.finish is not None for row in rows), sum(len(row.tokens) for row in rows))

            values = self._run([rows[i] for i in batch], size, rules, ends, stops, logprobs, tell)
            found |= dict(zip(batch, values, strict=True))
        for row in rows:
            row.close(ends, stops)
        return [
            Generation(row.text, row.tokens, row.finish, found[i] if logprobs else None, len(row.prompt))
            for i, row in enumerate(rows)
        ]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]], *, batch_size: int = BATCH_SIZE,
        progress: Callable[[int], None] | None = None,
    ) -> list[Score]:  # fmt: skip
        """The log-likelihood of each completion behind its prompt, token by token; no EOS is added.

        Args:
            completions: texts (tokenised as `ftjax.generate.score.completion_ids` says) or token ids.
            progress: called with the number of scored completions so far.

        Raises UserError for an empty completion, and for a text that does not fit into the model's context.
        """
        pairs = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids = self.encode(prompt, number)
            pairs.append((ids, completion_ids(prompt, ids, completion, self.tokenizer)))
            size = len(ids) + len(pairs[-1][1])
            if size == len(ids) or size > self.context:
                problem = "is empty" if size == len(ids) else f"ends at token {size}, and the model's context is {self.context}"
                raise UserError(f"completion {number + 1} {problem}")
        batches, rows = groups([len(prompt) + len(completion) for prompt, completion in pairs], batch_size, self.shards)
        found: dict[int, Score] = {}
        for batch in batches:
            with jax.set_mesh(self.mesh):
                placed = map(self._place, arrays([pairs[i] for i in batch], rows))
                logprobs, greedy = map(np.asarray, self._score(self.params, *placed))
            for row, i in enumerate(batch):
                tokens = pairs[i][1]
                values = logprobs[row, : len(tokens)].tolist()
                found[i] = Score(tokens, values, bool(greedy[row, : len(tokens)].all()))
            if progress:
                progress(len(found))
        return [found[i] for i in range(len(pairs))]

    def encode(self, prompt: Prompt, number: int = 0) -> list[int]:
        """The ids of a prompt. Raises UserError where there are none, too many, or some that the model does not have."""
        if not isinstance(prompt, str) and all(isinstance(token, int | np.integer) for token in prompt):
            ids = [int(token) for token in prompt]
        else:
            ids = render_prompt(prompt, self.tokenizer)
        if not ids:
            raise UserError(f"prompt {number + 1} is empty, and this tokenizer puts nothing before it; give at least a word")
        vocab = self.model.config["vocab_size"]
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

    # ---- one batch ----

    def _run(
        self, rows: list[Answer], size: int, rules: Rules, ends: frozenset[int], stops: StopStrings, logprobs: bool,
        tell: Callable[[], None],
    ) -> list[list[float]]:  # fmt: skip
        """Answer one batch; the tokens' log-probabilities come back."""
        longest = bucket(max(row.limit for row in rows), 16)
        with jax.set_mesh(self.mesh):
            tokens, length = self._padded(rows, size)
            slots = length + longest
            block = self._block(size, length, slots)
            state, view = self._prefill(
                self.params, *tokens, rules, slots=slots, longest=longest, block=block, logprobs=logprobs
            )
            chunk = CHUNK_WITH_STOPS if stops.strings else CHUNK
            while True:
                seen = self._read(rows, view, ends, stops)
                tell()
                if all(row.finish for row in rows):
                    break
                crossing = self._crossing(rows)
                if crossing == 0:
                    tokens, length = self._padded(rows, size)
                    slots = length + longest
                    block = self._block(size, length, slots)
                    state, view = self._again(self.params, state, *tokens, rules, slots=slots, block=block)
                    continue
                stopped = np.array([row.finish is not None for row in rows] + [True] * (size - len(rows)))
                until = seen + min(chunk, crossing)
                state, view = self._decode(self.params, state, self._place(stopped), rules, self._everywhere(np.int32(until)))
            values = None if view.logprobs is None else np.asarray(view.logprobs)
        return [[] if values is None else values[i, : len(row.tokens)].tolist() for i, row in enumerate(rows)]

    def _read(self, rows: list[Answer], view: View, ends, stops: StopStrings) -> int:
        step, tokens = int(view.step), np.asarray(view.tokens)
        for row, found in zip(rows, tokens[: len(rows)], strict=True):
            if not row.finish:
                row.read(found[len(row.tokens) : step].tolist(), ends, stops)
        return step

    def _crossing(self, rows: list[Answer]) -> float:
        """Steps until a row outgrows what its cached keys were rotated for; 0: now."""
        at = recomputes_at(self.model.config)
        if at is None:
            return math.inf
        left = [at + 1 - len(row.prompt) - len(row.tokens) for row in rows if not row.finish and len(row.prompt) <= at]
        return min((steps for steps in left if steps >= 0), default=math.inf)

    def _padded(self, rows: list[Answer], size: int) -> tuple[tuple[jax.Array, jax.Array], int]:
        """Prompts, with their answers so far, as placed arrays of tokens and segment ids; and their length."""
        texts = [[*row.prompt, *row.tokens] for row in rows]
        length = bucket(max(map(len, texts)), 16)
        return tuple(map(self._place, left_padded(texts, size, length))), length

    def _block(self, rows: int, length: int, slots: int) -> int:
        if recomputes_at(self.model.config) is not None or "dynamic" in str(self.model.config.get("rope_parameters")):
            return length  # the frequencies depend on the length of the whole text
        heads = self.model.config.get("num_attention_heads") or self.model.config["n_head"]
        return block_length(rows, length, slots, heads)

    def _stop_tokens(self, stops: StopStrings) -> frozenset[int]:
        """Stop strings that are a special token, which never shows in a text."""
        known = self.tokenizer.get_added_vocab() if stops.strings else {}
        return frozenset(known[string] for string in stops.strings if string in known)

    def _place(self, rows: np.ndarray) -> jax.Array:
        """An array whose first axis is the batch, over the devices."""
        where = NamedSharding(self.mesh, spec(("batch",) + (None,) * (rows.ndim - 1)))
        return jax.make_array_from_callback(rows.shape, where, lambda index: rows[index])

    def _everywhere(self, value: np.ndarray) -> jax.Array:
        where = NamedSharding(self.mesh, spec(()))
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def _with_adapters_tokenizer(settings: ModelConfig, adapter: str | Path | None) -> ModelConfig:
    """An adapter folder that brings a tokenizer means that one: it may have a chat template that the base lacks."""
    if settings.tokenizer is None and adapter and (Path(adapter) / "tokenizer_config.json").is_file():
        return settings.model_copy(update={"tokenizer": str(adapter)})
    return settings
