"""Rows of the embedding that train beside an adapter, for selected tokens: PEFT's `trainable_token_indices`.

The rows replace those of the base model, they are not an update to them; if the output is tied to the embedding, on both sides.
The file has them as `<module>.token_adapter.trainable_tokens_delta` `[rows, E]`. There is no gradient of the size of the
vocabulary: the rows and their logits are computed separately and scattered to their indices.

Legend: B batch, T query length, E embed, V vocab, N tokens whose rows train.
"""

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from ftjax.config import LoraConfig
from ftjax.methods.method import Start
from ftjax.methods.walk import Site, describe, embeddings, linears, matches
from ftjax.models.model import Model
from ftjax.models.nn.context import Context, is_virtual
from ftjax.models.nn.layers import project
from ftjax.models.nn.param import Buffer, Init, Row, param

DELTA = "trainable_tokens_delta"


def _rows(site: Site, ids: Sequence[int]) -> tuple[nnx.Param, Buffer]:
    """Build the trained rows [N, E], which `start` fills with the base model's, and their ids."""
    weight = site.layer.weight
    embed, axis = weight.get_value().shape[1], weight.row.axes[1]
    row = {"init": Init("zeros"), "trainable": True, "adapter": True}
    delta = param((len(ids), embed), (None, axis), f"token_adapter.{DELTA}", **row)
    return delta, Buffer(np.array(ids, np.int32), row=Row((None,), "ids"))


class TokenRows(nnx.Module):
    """A frozen Embedding with some rows replaced by trained ones."""

    def __init__(self, site: Site, ids: Sequence[int]):
        self.base = site.layer
        self.trainable_tokens_delta, self.ids = _rows(site, ids)

    def without_adapter(self) -> nnx.Module:
        """Return the module to put here when the method is removed."""
        return self.base

    def __call__(self, tokens: Shaped[Array, "B T ..."], dtype) -> Float[Array, "B T E"]:
        """Look up ids, or pass embeddings of virtual tokens through."""
        rows = self.base(tokens, dtype)
        if is_virtual(tokens):
            return rows
        # Binary search finds the row of a token: a table of all tokens would be part of the program.
        order = jnp.argsort(self.ids[...])
        ids = jnp.asarray(self.ids[...])[order]
        at = jnp.minimum(jnp.searchsorted(ids, tokens), ids.size - 1)
        own = jnp.take(self.trainable_tokens_delta[...], order[at], axis=0)
        return jnp.where((ids[at] == tokens)[..., None], own.astype(dtype), rows)

    def attend(self, x: Float[Array, "*of E"]) -> Float[Array, "*of V"]:
        """Compute logits, if the output is tied."""
        return self.base.attend(x).at[..., self.ids[...]].set(project(x, self.trainable_tokens_delta[...]))


class OutputRows(nnx.Module):
    """A frozen output projection with some rows replaced by trained ones."""

    def __init__(self, site: Site, ids: Sequence[int]):
        self.base = site.layer
        self.trainable_tokens_delta, self.ids = _rows(site, ids)

    def without_adapter(self) -> nnx.Module:
        """Return the module to put here when the method is removed."""
        return self.base

    def __call__(self, x: Float[Array, "*of E"], ctx: Context) -> Float[Array, "*of V"]:
        """Compute logits."""
        return self.base(x, ctx).at[..., self.ids[...]].set(project(x, self.trainable_tokens_delta[...]))


def _sites(root: nnx.Module) -> list[Site]:
    """Return the token embedding (not that of positions), and the output projection if it is a matrix of its own."""
    tables = [site for site in embeddings(root) if "vocab" in site.layer.weight.row.axes]
    return tables + [site for site in linears(root) if site.path == root.output and "vocab" in site.layer.weight.row.axes]


def _asked(root: nnx.Module, config: LoraConfig) -> dict[str, list[int]]:
    """Return ids by the configuration's name of the module."""
    found = config.trainable_token_indices or {}
    return found if isinstance(found, dict) else {_sites(root)[0].names[0]: found}


def row_sites(root: nnx.Module, config: LoraConfig) -> Iterator[tuple[Site, list[int]]]:
    """Yield the modules with trained rows, and the ids of these rows."""
    for module, ids in _asked(root, config).items():
        yield from ((site, ids) for site in _sites(root) if ids and matches(site.names[0], [module]))


def attach_rows(site: Site, ids: Sequence[int], root: nnx.Module) -> None:
    """Add trained rows to an abstract model, in place."""
    output = site.path == root.output and not hasattr(site.layer, "attend")
    site.replace(OutputRows(site, ids) if output else TokenRows(site, ids))


def row_problems(root: nnx.Module, config: LoraConfig) -> Iterator[str]:
    """Yield what is wrong with `trainable_token_indices` in this model."""
    option, sites = "method.trainable_token_indices", _sites(root)
    for module, ids in _asked(root, config).items():
        site = next((site for site in sites if matches(site.names[0], [module])), None)
        if site is None:
            has = describe(site.names[0] for site in sites)
            yield f"{option}: no module with one row per token is named {module!r}; the model has {has}"
            continue
        vocab = site.layer.weight.get_value().shape[0]
        if outside := sorted(one for one in ids if not 0 <= one < vocab):
            yield f"{option}: {outside} are no tokens of this model, which has 0 to {vocab - 1}"
        if len(set(ids)) < len(ids):
            yield f"{option}: a token of {module} is named twice; name each once"
        if getattr(site.layer, "bias", None) is not None:
            yield f"{option}: {module} has a bias, which PEFT leaves out of these tokens' logits; use modules_to_save for it"


def start_rows(model: Model, begin: Start) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the base model's rows, by path."""
    for path in model.specs:
        layer, found, _ = path.rpartition(f".{DELTA}")
        if found:
            rows = [begin.fetch(f"{layer}.base.weight", (int(one),)) for one in model.buffers[f"{layer}.ids"]]
            yield path, np.stack(rows).astype(np.float32)


def with_rows(model: Model, layer: str, weight: np.ndarray, fetch: Callable[[str, tuple], np.ndarray]) -> np.ndarray:
    """Return a weight `[V, E]` with the trained rows in it."""
    weight = weight.astype(np.float32)  # a copy
    weight[model.buffers[f"{layer}.ids"]] = fetch(f"{layer}.{DELTA}", ())
    return weight
