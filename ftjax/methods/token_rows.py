"""Rows of the embedding that train beside an adapter, one for each of some tokens: PEFT's `trainable_token_indices`.

The rows take the place of the base model's, they are no update to them; where the output is tied to the embedding, they do so
on both sides. The file has them as `<module>.token_adapter.trainable_tokens_delta` `[rows, E]`. No gradient of the size of the
vocabulary comes to be: rows and their logits are computed by themselves and put in their places.

Legend: B batch, T query length, E embed, V vocab, N tokens whose rows train.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ftjax.config import LoraConfig
from ftjax.methods.method import Start
from ftjax.methods.walk import Site, describe, embeddings, linears, matches
from ftjax.models.context import Context
from ftjax.models.layers import is_virtual, project
from ftjax.models.model import Model
from ftjax.models.param import Buffer, Init, Row, param

DELTA = "trainable_tokens_delta"


def _rows(site: Site, ids: Sequence[int]) -> tuple[nnx.Param, Buffer]:
    """The trained rows [N, E], to which `start` gives the base model's, and their ids."""
    weight = site.layer.weight
    embed, axis = weight.get_value().shape[1], weight.row.axes[1]
    row = {"init": Init("zeros"), "trainable": True, "adapter": True}
    delta = param((len(ids), embed), (None, axis), f"token_adapter.{DELTA}", **row)
    return delta, Buffer(np.array(ids, np.int32), row=Row((None,), "ids"))


class TokenRows(nnx.Module):
    """A frozen Embedding of which some rows are replaced by trained ones."""

    def __init__(self, site: Site, ids: Sequence[int]):
        self.base = site.layer
        self.trainable_tokens_delta, self.ids = _rows(site, ids)

    def without_adapter(self) -> nnx.Module:
        """What is in this place where the method is taken out of the model."""
        return self.base

    def __call__(self, tokens: jax.Array, dtype) -> jax.Array:
        """Ids `[B, T]` (or embeddings of virtual tokens, which go through) -> `[B, T, E]`."""
        rows = self.base(tokens, dtype)
        if is_virtual(tokens):
            return rows
        # Which row a token has is found by a binary search: a table of all tokens would be part of the program.
        order = jnp.argsort(self.ids[...])
        ids = jnp.asarray(self.ids[...])[order]
        at = jnp.minimum(jnp.searchsorted(ids, tokens), ids.size - 1)
        own = jnp.take(self.trainable_tokens_delta[...], order[at], axis=0)
        return jnp.where((ids[at] == tokens)[..., None], own.astype(dtype), rows)

    def attend(self, x: jax.Array) -> jax.Array:
        """`[..., E] -> [..., V]`, where the output is tied."""
        return self.base.attend(x).at[..., self.ids[...]].set(project(x, self.trainable_tokens_delta[...]))


class OutputRows(nnx.Module):
    """A frozen output projection of which some rows are replaced by trained ones."""

    def __init__(self, site: Site, ids: Sequence[int]):
        self.base = site.layer
        self.trainable_tokens_delta, self.ids = _rows(site, ids)

    def without_adapter(self) -> nnx.Module:
        """What is in this place where the method is taken out of the model."""
        return self.base

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """`[..., E] -> [..., V]`."""
        return self.base(x, ctx).at[..., self.ids[...]].set(project(x, self.trainable_tokens_delta[...]))


def _sites(root: nnx.Module) -> list[Site]:
    """The embedding of tokens (not that of positions), and the output projection where it is a matrix of its own."""
    tables = [site for site in embeddings(root) if "vocab" in site.layer.weight.row.axes]
    return tables + [site for site in linears(root) if site.path == root.output and "vocab" in site.layer.weight.row.axes]


def _asked(root: nnx.Module, config: LoraConfig) -> dict[str, list[int]]:
    """Ids by what a configuration calls the module."""
    found = config.trainable_token_indices or {}
    return found if isinstance(found, dict) else {_sites(root)[0].names[0]: found}


def row_sites(root: nnx.Module, config: LoraConfig) -> Iterator[tuple[Site, list[int]]]:
    """The modules of which rows train, and the ids of these."""
    for module, ids in _asked(root, config).items():
        yield from ((site, ids) for site in _sites(root) if ids and matches(site.names[0], [module]))


def attach_rows(site: Site, ids: Sequence[int], root: nnx.Module) -> None:
    """Put them into an abstract model, in place."""
    output = site.path == root.output and not hasattr(site.layer, "attend")
    site.replace(OutputRows(site, ids) if output else TokenRows(site, ids))


def row_problems(root: nnx.Module, config: LoraConfig) -> Iterator[str]:
    """What is wrong with `trainable_token_indices` in this model."""
    option, sites = "method.trainable_token_indices", _sites(root)
    for module, ids in _asked(root, config).items():
        site = next((site for site in sites if matches(site.names[0], [module])), None)
        if site is None:
            has = describe(site.names[0] for site in sites)
            yield f"{option}: no module with a row for each token is named {module!r}; the model has {has}"
            continue
        vocab = site.layer.weight.get_value().shape[0]
        if outside := sorted(one for one in ids if not 0 <= one < vocab):
            yield f"{option}: {outside} are no tokens of this model, which has 0 to {vocab - 1}"
        if len(set(ids)) < len(ids):
            yield f"{option}: a token of {module} is named twice; name each once"
        if getattr(site.layer, "bias", None) is not None:
            yield f"{option}: {module} has a bias, which PEFT leaves out of these tokens' logits; use modules_to_save for it"


def start_rows(model: Model, begin: Start) -> Iterator[tuple[str, np.ndarray]]:
    """The base model's rows, by path."""
    for path in model.specs:
        layer, found, _ = path.rpartition(f".{DELTA}")
        if found:
            rows = [begin.fetch(f"{layer}.base.weight", (int(one),)) for one in model.buffers[f"{layer}.ids"]]
            yield path, np.stack(rows).astype(np.float32)


def with_rows(model: Model, layer: str, weight: np.ndarray, fetch: Callable[[str, tuple], np.ndarray]) -> np.ndarray:
    """A weight `[V, E]` with the trained rows in it."""
    weight = weight.astype(np.float32)  # a copy
    weight[model.buffers[f"{layer}.ids"]] = fetch(f"{layer}.{DELTA}", ())
    return weight
