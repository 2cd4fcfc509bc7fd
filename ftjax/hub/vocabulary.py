"""Resizes the vocabulary: adds rows to the embedding and to the projection to the vocabulary for new tokens.

A new row is the mean of the old ones, in float32 (Hewitt 2021, "Initializing new word embeddings for pretrained language
models"). It equals transformers' `resize_token_embeddings` without the noise of 1e-9 times the covariance.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.config import Config, ModelConfig
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import PREFIX, adapter_file, read_adapter_config
from ftjax.hub.adapter.untied import with_adapters_output
from ftjax.hub.fetch import resolve_config
from ftjax.hub.load import read_hf_config
from ftjax.hub.run_folder import starting_adapter
from ftjax.hub.source import TensorSource
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.models.composite import text_of, with_text
from ftjax.models.model import Model, build_module
from ftjax.models.nn.param import Spec, specs

CHUNK = 4096  # rows read at a time for their mean


class Resized:
    """A `TensorSource` whose tensors `names` are resized to `rows` rows."""

    def __init__(self, source: TensorSource, names: set[str], rows: int):
        self._source, self._names, self._rows = source, names, rows
        self._means: dict[str, np.ndarray] = {}

    def keys(self) -> Sequence[str]:
        return self._source.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._source.shape(name))
        return (self._rows, *shape[1:]) if name in self._names else shape

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(name)

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        if name not in self._names:
            return self._source.read(name, index)
        first, *rest = index or (slice(None),)
        start, stop, _ = first.indices(self._rows)
        have = self._source.shape(name)[0]
        old = self._source.read(name, (slice(min(start, have), min(stop, have)), *rest))
        new = np.broadcast_to(self._mean(name)[tuple(rest)], (stop - max(start, min(stop, have)), *old.shape[1:]))
        return np.concatenate([old, new.astype(old.dtype)])

    def _mean(self, name: str) -> np.ndarray:
        if name not in self._means:
            rows = self._source.shape(name)[0]
            chunks = (self._source.read(name, (slice(at, min(at + CHUNK, rows)),)) for at in range(0, rows, CHUNK))
            self._means[name] = (sum(chunk.astype(np.float64).sum(0) for chunk in chunks) / rows).astype(np.float32)
        return self._means[name]


def with_new_tokens(
    model: ModelConfig, hf_config: dict[str, Any], source: TensorSource | None
) -> tuple[dict[str, Any], TensorSource]:
    """Return config.json and tensors of a base model, with rows for the tokens that the configuration adds.

    A vocabulary that is larger than its tokenizer has room already and keeps the checkpoint's rows.
    """
    rows, multiple = text_of(hf_config)["vocab_size"], model.pad_vocab_to_multiple_of or 1
    if model.adds_tokens:
        rows = max(rows, tokens_of(model))
    return _resized(hf_config, source, math.ceil(rows / multiple) * multiple)


def with_adapters_tokens(
    adapter: Path, hf_config: dict[str, Any], source: TensorSource | None
) -> tuple[dict[str, Any], TensorSource]:
    """Return config.json and tensors of a base model with as many rows as the adapter folder's embeddings, or as its
    tokenizer needs."""
    stored = adapter_file(adapter)
    rows = {stored.shape(name)[axis] for name, axis in _rows_in(hf_config, stored.keys())}
    if len(rows) > 1:
        raise UserError(f"{adapter}: its embeddings have different numbers of rows: {', '.join(map(str, sorted(rows)))}")
    if rows:
        return _resized(hf_config, source, rows.pop())  # fewer where padding rows of the base were cut off
    ids = read_adapter_config(adapter).get("trainable_token_indices") or []
    needed = [one + 1 for own in (ids.values() if isinstance(ids, dict) else [ids]) for one in own]
    if (adapter / "tokenizer_config.json").is_file():
        needed.append(tokens_of(ModelConfig(path=str(adapter))))
    return _resized(hf_config, source, max([text_of(hf_config)["vocab_size"], *needed]))


def _rows_in(hf_config: Mapping[str, Any], names: Collection[str]) -> Iterator[tuple[str, int]]:
    """Yield the tensors of an adapter's file with one row per token, and their token axis."""
    for name in _tensors(hf_config):
        module = f"{PREFIX}{name.removesuffix('weight')}"
        rows = {"weight": 0, "base_layer.weight": 0, "lora_B.weight": 0, "lora_embedding_A": 1}  # PEFT's names
        yield from ((module + end, axis) for end, axis in rows.items() if module + end in names)


def hf_config_of(config: Config) -> dict[str, Any]:
    """Return config.json of a run's model with the changes of the run: rows and output of its adapter, and rows for added
    tokens.

    Reads no weights. Raises UserError if config.json, the adapter's folder, or the tokenizer of added tokens cannot be
    read.
    """
    hf_config = read_hf_config(resolve_config(config.model.path, config.model.revision))
    if adapter := starting_adapter(config.method):
        hf_config, _ = with_adapters_output(adapter, hf_config, None)
        hf_config, _ = with_adapters_tokens(adapter, hf_config, None)
    return with_new_tokens(config.model, hf_config, None)[0]


def embeddings_of(config: Config) -> int:
    """Return the number of embeddings of a run's model. Raises UserError as `hf_config_of` does."""
    return text_of(hf_config_of(config))["vocab_size"]


def refuse_untrained_rows(model: Model, old: int, tokens: int, method: str) -> None:
    """Raise UserError if the rows of new tokens are not trained: all of them would stay equal.

    Args:
        old: number of rows before.
        tokens: number of tokens in the tokenizer; further rows are padding.
    """
    new = range(old, tokens)
    fixed = {
        spec.module
        for spec in model.frozen.values()
        if "vocab" in spec.row.axes and not set(new) <= set(_rows_that_train(model, spec))
    }
    if not new or not fixed:
        return
    names = [name.rpartition(".")[2] for name in sorted(fixed)]
    if method == "full":
        instead = f"name them in method.train: [{', '.join(names)}]"
    elif method == "lora":
        tied = len([spec for spec in model.specs.values() if spec.row.axes[:1] == ("vocab",)]) == 1
        ids = f"[{', '.join(map(str, new))}]"
        rows = ids if tied else f"{{{', '.join(f'{name}: {ids}' for name in names)}}}"
        instead = f"write method.trainable_token_indices: {rows}"
        instead += "" if tied else f", or method.modules_to_save: [{', '.join(names)}]"
    else:
        instead = "use method.name: full"
    raise UserError(
        f"model.add_tokens: {' and '.join(sorted(fixed))} get {len(new)} new rows, and this method trains neither these nor "
        f"the old ones, so that all new tokens would stay the same; {instead}"
    )


def _rows_that_train(model: Model, spec: Spec) -> Sequence[int]:
    """Return the rows of a frozen weight that trained rows replace."""
    return model.buffers.get(f"{spec.path.removesuffix('.base.weight')}.ids", ())


def tokens_of(model: ModelConfig) -> int:
    """Return one more than the highest token id, including tokens that the configuration adds."""
    return max(load_tokenizer(model).get_vocab().values()) + 1


def _resized(hf_config: dict[str, Any], source: TensorSource | None, rows: int) -> tuple[dict[str, Any], TensorSource]:
    if rows == text_of(hf_config)["vocab_size"]:
        return hf_config, source
    own_table = "vocab_size_per_layer_input"  # Gemma 4 has a second table, which transformers resizes too
    sizes = {"vocab_size": rows} | ({own_table: rows} if own_table in text_of(hf_config) else {})
    return with_text(hf_config, **sizes), Resized(source, _tensors(hf_config), rows)


def _tensors(hf_config: Mapping[str, Any]) -> set[str]:
    """Return the names of checkpoint tensors with one row per token."""
    root = build_module(hf_config)
    rows: list[Spec] = [spec for spec in specs(root).values() if "vocab" in spec.row.axes]
    named = {piece.name for spec in rows for layout in (*spec.row.layouts, None) for piece in spec.pieces(layout)}
    return named | {name for name in root.ignored if name.endswith(("lm_head.weight", "embed_out.weight"))}  # a tied copy
