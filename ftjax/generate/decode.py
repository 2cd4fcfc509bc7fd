"""What each row of a batch decodes with, and how its next token is chosen.

Legend: B rows of the batch, V vocab.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ftjax.generate.sample import RowSampling, choose, process, restrict
from ftjax.mesh import constrain
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
        rules, rows, active = state.rules, jnp.arange(logits.shape[0]), ~state.done
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rules.keys), state.count)
        limited = restrict(logits, rules.biased, rules.bias, mask)
        processed = process(limited, state.uses, rules.sampling)
        token = choose(processed, rules.sampling.temperature, keys)
        judged = processed if self.of_sampler else logits
        logprob = judged[rows, token] - jax.nn.logsumexp(judged, axis=-1)
        count = state.count + active.astype(jnp.int32)
        ended = jnp.any(token[:, None] == rules.ends, axis=1) | (count >= rules.limits)
        state = state._replace(
            token=jnp.where(active, token, state.token),
            count=count,
            done=state.done | ended,
            uses=state.uses.at[rows, token].add(active.astype(jnp.int32)),
        )
        return state, token, logprob

    def logits(self, module: Any, hidden: jax.Array, adapters: jax.Array | None = None) -> jax.Array:
        one = jnp.ones((1, 1), jnp.int32)
        return constrain(module.unembed(hidden, Context(one, one, self.dtype, adapters=adapters)), "batch", "vocab")
