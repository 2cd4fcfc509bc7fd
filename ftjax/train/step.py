"""One optimizer update, as a pure function over pytrees.

Legend: A microbatches, B rows of a microbatch (over all devices), T length.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from ftjax.flops import TrainFlops
from ftjax.models.nn.context import Context
from ftjax.objectives.loss import LossTotals, added, zeros_of
from ftjax.train.offload import moved, on_host, sharding_of_state
from ftjax.train.rounding import to_bfloat16


class TrainState(NamedTuple):
    """State that an update changes."""

    params: dict[str, Float[Array, "..."]]  # the trained parameters
    opt_state: Any
    step: Int[Array, ""]  # updates so far


class StepMetrics(NamedTuple):
    loss: Float32[Array, ""]
    weight: Float32[Array, ""]  # divisor of the summed loss; for next-token training the number of trained tokens
    trained: Float32[Array, ""]  # sum of the tokens' weights
    tokens: Shaped[Array, ""]  # tokens that are not padding
    flops: Float32[Array, ""]  # needed for these tokens (`ftjax.flops`), on all devices
    grad_norm: Float32[Array, ""]  # before clipping
    update_norm: Float32[Array, ""]
    good: Bool[Array, ""]  # whether the update was applied
    metrics: dict[str, tuple[Float32[Array, ""], Float32[Array, ""]]]  # of the objective: weighted sums and their weights


@dataclass(frozen=True)
class Runtime:
    """Static settings of the forward pass."""

    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"

    def context(self, batch: Mapping[str, Shaped[Array, "B _"]], dropout: jax.Array | None = None) -> Context:
        found = Context(batch["positions"], batch["segment_ids"], self.dtype, self.attention, self.remat, dropout)
        return replace(found, ends=batch.get("ends"))


class LossFn(Protocol):
    """Loss of a microbatch: see `ftjax.objectives.objective.Loss`."""

    def __call__(
        self, trainable: dict, frozen: dict, batch: dict, ctx: Context, statistics: Any = None, number: Any = 0
    ) -> tuple[LossTotals, jax.Array]:
        """Return the totals and the auxiliary loss.

        Args:
            statistics: what the objective needs of all microbatches; None if this is the only one.
            number: the index of this microbatch.
        """


# (trainable, frozen, microbatch, context) -> what the loss needs of every microbatch (`Objective.statistics`)
StatisticsFn = Callable[[dict, dict, dict, Context], Any]


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, runtime: Runtime, flops: TrainFlops,
    statistics_fn: StatisticsFn | None = None,
):  # fmt: skip
    """Build `step(state, frozen, batch, key, limit) -> (state, StepMetrics)`.

    `batch` holds arrays `[A, B, T]`. Losses and gradients are summed over all rows and divided once by the total weight, so
    that they do not depend on the split into microbatches and devices. An update whose loss or gradient is not finite, or whose
    loss exceeds `limit`, is not applied: the state stays as it was.
    """

    def grads_of(params, frozen, micro, key, statistics=None, number=0):
        def total(params):
            totals, aux = loss_fn(params, frozen, micro, runtime.context(micro, key), statistics, number)
            return totals.loss + aux * totals.weight, totals

        return jax.grad(total, has_aux=True)(params)

    def step(state: TrainState, frozen: dict, batch: dict, key: jax.Array, limit: jax.Array):
        key = jax.random.fold_in(key, state.step)
        count = batch["tokens"].shape[0]
        if count == 1:
            grads, totals = grads_of(state.params, frozen, jax.tree.map(lambda x: x[0], batch), key)
        else:
            statistics = None
            if statistics_fn is not None:

                def look(_, scanned):
                    micro, number = scanned
                    ctx = runtime.context(micro, jax.random.fold_in(key, number))
                    return None, statistics_fn(state.params, frozen, micro, ctx)

                _, statistics = jax.lax.scan(look, None, (batch, jnp.arange(count)))

            def body(carry, scanned):
                micro, number = scanned
                more = grads_of(state.params, frozen, micro, jax.random.fold_in(key, number), statistics, number)
                return added(carry, more), None

            first = jax.tree.map(lambda x: x[0], batch)
            none = zeros_of(lambda: loss_fn(state.params, frozen, first, runtime.context(first, key), statistics)[0])
            zeros = as_float32(jax.tree.map(jnp.zeros_like, state.params)), none
            (grads, totals), _ = jax.lax.scan(body, zeros, (batch, jnp.arange(count)))
        weight = jnp.maximum(totals.weight, 1e-9)
        grads = jax.tree.map(lambda g: g / weight, as_float32(grads))
        loss, grad_norm = totals.loss / weight, optax.tree.norm(grads)
        old = state._replace(opt_state=moved(state.opt_state, jax.memory.Space.Device))
        updates, opt_state = optimizer.update(grads, old.opt_state, as_float32(old.params))
        new = TrainState(_updated(old.params, updates, old.step), opt_state, old.step + 1)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= limit)
        new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
        new = new._replace(opt_state=moved(new.opt_state, jax.memory.Space.Host))
        tokens = jnp.sum(batch["segment_ids"] > 0)
        needed = flops.of_batch(batch["positions"], batch["segment_ids"])
        trained = jnp.sum(batch["weights"])
        norms = grad_norm, optax.tree.norm(updates)
        return new, StepMetrics(loss, totals.weight, trained, tokens, needed, *norms, good, totals.metrics)

    return step


def as_float32(params: Mapping[str, Float[Array, "..."]]) -> dict[str, Float32[Array, "..."]]:
    """Cast parameters to the dtype of the optimizer, whatever dtype they are held in."""
    return {path: leaf.astype(jnp.float32) for path, leaf in params.items()}


def _updated(
    params: dict[str, Float[Array, "..."]], updates: Mapping[str, Float32[Array, "..."]], step: Int[Array, ""]
) -> dict[str, Float[Array, "..."]]:
    """Add the updates; bfloat16 is rounded stochastically, because most updates are smaller than its resolution."""
    new = {path: leaf.astype(jnp.float32) + updates[path] for path, leaf in params.items()}
    return {
        path: to_bfloat16(leaf, step) if params[path].dtype == jnp.bfloat16 else leaf.astype(params[path].dtype)
        for path, leaf in new.items()
    }


def make_eval_step(loss_fn: LossFn, runtime: Runtime):
    """Build `step(params, frozen, batch) -> LossTotals` for a batch `[B, T]`."""

    def step(params: dict, frozen: dict, batch: dict) -> LossTotals:
        return loss_fn(params, frozen, batch, runtime.context(batch))[0]

    return step


def init_state(params: dict[str, Float[Array, "..."]], optimizer: optax.GradientTransformation) -> TrainState:
    """Initialise the state before the first update."""
    abstract = abstract_state(params, optimizer)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(lambda params: optimizer.init(as_float32(params)), out_shardings=placed)(params)
    return TrainState(params, opt_state, jax.device_put(jnp.int32(0), abstract.step.sharding))


def optimizer_shapes(params: Mapping[str, Any], optimizer: optax.GradientTransformation) -> Any:
    """Return the optimizer state for these parameters (arrays or shapes), as shapes."""
    return jax.eval_shape(lambda params: optimizer.init(as_float32(params)), dict(params))


def abstract_state(params: Mapping[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """Return the result of `init_state` as shapes: moments are sharded like their parameters, scalars are replicated.

    Args:
        params: arrays, or shapes with shardings.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, dict(params))
    example = next(iter(shardings.values()))
    everywhere = jax.sharding.NamedSharding(example.mesh, jax.sharding.PartitionSpec())
    shapes = optimizer_shapes(params, optimizer)
    placed = optax.tree.map_params(optimizer, sharding_of_state, shapes, shardings, transform_non_params=lambda _: everywhere)
    placed = on_host(placed, shapes)

    def at(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return TrainState(
        {path: at(leaf, leaf.sharding) for path, leaf in params.items()},
        jax.tree.map(at, shapes, placed),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
    )
