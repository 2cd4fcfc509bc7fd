"""What each row of a batch decodes with, and how its next token is chosen.

Legend: B rows of the batch, V vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ftjax.generate.sample import RowSampling, choose, process, restrict
from ftjax.mesh import RULES, axis_of_samples, constrain
from ftjax.models.model import Model
from ftjax.models.nn.cache import Cache
from ftjax.models.nn.context import Context


class Rules(NamedTuple):
    """Sampling settings and stopping criteria per row.

    Attributes:
        sampling: arrays [B].
        keys: [B, 2] uint32, key data of one PRNG key per row, so that rows are independent of each other.
        ends: [B, e] int32, token ids that end an answer, padded with -1.
        limits: [B] int32, maximum length of the answer in tokens.
        biased: [B, b] int32, tokens whose logits have a bias, padded with V.
        bias: [B, b] float32.
    """

    sampling: RowSampling
    keys: jax.Array
    ends: jax.Array
    limits: jax.Array
    biased: jax.Array
    bias: jax.Array


class State(NamedTuple):
    """Decoding state of a batch.

    Attributes:
        token: [B] int32, the most recent token, not yet in the cache.
        count: [B] int32, tokens of the answer so far.
        done: [B] bool, rows that are finished and no longer change.
        uses: [B, V] int32, how often prompt and answer have each token (`ftjax.generate.sample.process`).
    """

    cache: Cache
    token: jax.Array
    count: jax.Array
    done: jax.Array
    uses: jax.Array
    rules: Rules


@dataclass(frozen=True, eq=False)
class Runner:
    """A model that runs with activations and cache in `dtype`."""

    model: Model
    dtype: Any
    of_sampler: bool = False  # log-probabilities are those of the distribution that tokens are drawn from

    def pick(
        self, state: State, logits: Float[Array, "B V"], mask: jax.Array | None = None
    ) -> tuple[State, Int[Array, " B"], Float[Array, " B"]]:
        """Choose the next token of each unfinished row; return the state, the token and its log-probability.

        Args:
            mask: tokens that grammars allow (`ftjax.generate.sample.restrict`); None allows all.
        """
        rules, active = state.rules, ~state.done

        def choose_here(logits, uses, mask, count, active, rules):
            keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rules.keys), count)
            processed = process(restrict(logits, rules.biased, rules.bias, mask), uses, rules.sampling)
            token = choose(processed, rules.sampling.temperature, keys)
            judged = processed if self.of_sampler else logits
            rows = jnp.arange(logits.shape[0])
            logprob = judged[rows, token] - jax.nn.logsumexp(judged, axis=-1)
            return token, logprob, uses.at[rows, token].add(active.astype(jnp.int32))

        token, logprob, uses = by_whole_rows(choose_here, logits, state.uses, mask, *by_row((state.count, active, rules)))
        token, logprob = by_row((token, logprob))
        count = state.count + active.astype(jnp.int32)
        ended = jnp.any(token[:, None] == rules.ends, axis=1) | (count >= rules.limits)
        last, count, done = by_row((jnp.where(active, token, state.token), count, state.done | ended))
        return state._replace(token=last, count=count, done=done, uses=uses), token, logprob

    def logits(self, module: Any, hidden: Float[Array, "B E"], adapters: jax.Array | None = None) -> Float[Array, "B V"]:
        """Return the logits of hidden states `[B, E]`, placed as `by_whole_rows` needs them."""
        one = jnp.ones((1, 1), jnp.int32)
        logits = constrain(module.unembed(hidden, Context(one, one, self.dtype, adapters=adapters)), "batch", "vocab")
        return constrain(logits, axis_of_samples(jax.sharding.get_abstract_mesh(), logits.shape[0]), None)


def by_whole_rows(function: Callable, *arrays: Any) -> Any:
    """Return `function(*arrays)`, computed on each device for some of the rows, of which it has the whole vocabulary.

    The output projection leaves a part of the vocabulary of every row on each device. To choose tokens from parts, every
    maximum and every sum would be a reduction over devices; one exchange of "some tokens of all rows" for "all tokens of some
    rows" replaces them. Where the rows do not divide by all devices, those of the batch have the whole vocabulary.

    Args:
        arrays: pytrees of arrays `[B, ...]`, as are the results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    rows = PartitionSpec(RULES[axis_of_samples(mesh, jax.tree.leaves(arrays)[0].shape[0])])
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)


def by_row(arrays: Any) -> Any:
    """Constrain arrays `[B, ...]` to the devices of the batch: the compiler would spread that of `by_whole_rows`."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), arrays)
