"""Mixture of experts: each token is routed to the k experts with the highest router scores; no token is ever dropped.

Tokens are sorted by expert and multiplied group by group (`ftjax.models.nn.grouped`; `jax.lax.ragged_dot_general` is one kernel
on TPU and GPU, and on CPU a masked dense product, which costs as much as all experts). Each device sorts its own tokens.

Sources: Shazeer et al. 2017 (arXiv:1701.06538); load-balancing loss: Fedus et al. 2021 (arXiv:2101.03961, eq. 4 to 6).

Legend: B batch, T length, M rows on one device, E embed, X experts, k experts per token, I in, O out.
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Int32

from ftjax.mesh import fitting
from ftjax.models.nn.context import Context
from ftjax.models.nn.exchange import exchanged
from ftjax.models.nn.grouped import Part, grouped
from ftjax.models.nn.layers import Linear, activation, project
from ftjax.models.nn.param import Init, Layout, param
from ftjax.models.nn.quantized import Nf4, Place, Quantized


class Router(nnx.Module):
    """Scores each token for each expert. It is not a `Linear`, as in transformers, so that PEFT's LoRA skips it."""

    def __init__(
        self, embed: int, experts: int, top_k: int, *, normalise: bool, bias: bool = False, layout: Layout | None = None
    ):
        """With `normalise`, the weights of the chosen experts sum to 1."""
        self.top_k, self.normalise = top_k, normalise
        self.weight = param((experts, embed), ("experts", "embed"), "weight", layouts=(layout,) if layout else ())
        self.bias = param((experts,), ("experts",), "bias", init=Init("zeros")) if bias else None

    def __call__(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float32[Array, "B T X"], Int32[Array, "B T k"], Float32[Array, "B T k"]]:
        """Return the logits, the chosen experts of each token, and their weights."""
        logits = project(x, self.weight[...])
        if self.bias is not None:
            logits = logits + self.bias[...].astype(x.dtype)
        logits = logits.astype(jnp.float32)
        best, chosen = jax.lax.top_k(logits, self.top_k)
        total = best if self.normalise else logits
        weights = jnp.exp(best - jax.nn.logsumexp(total, axis=-1, keepdims=True))
        return logits, chosen, weights


class Group(NamedTuple):
    """Rows that one device processes, sorted by expert.

    Devices with the same rows and different parts of the `mlp` dimension add up their results. Terms that must be added only
    once (output biases) are multiplied by `once`: 1 on one of these devices, 0 on the others.
    """

    rows: jax.Array  # [M, E]
    sizes: jax.Array  # [X] int32: number of rows per expert
    owner: jax.Array  # [M] int32: the expert of each row
    once: jax.Array | int


# (rows, parameters) -> [M, E]
Feedforward = Callable[[Group, dict[str, jax.Array | Quantized]], jax.Array]


def dispatch(
    x: Float[Array, "B T E"],
    chosen: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    feedforward: Feedforward,
    params: dict[str, Float[Array, "X ..."] | Quantized],
    axes: dict[str, tuple[str | None, ...]],
    trained: frozenset[str] = frozenset(),
) -> Float[Array, "B T E"]:
    """Return the weighted sum of the chosen experts' outputs for each token.

    Under a mesh, tokens are sharded, whole experts are sharded along `expert`, and the experts' `mlp` dimension may be sharded
    too. Tokens that are sharded along `expert` go to the devices of their experts and back (`ftjax.models.nn.exchange`); others
    are there already, and each device's sums are added. So are partial sums over `mlp` of devices with the same tokens.

    Args:
        axes: logical axes of each parameter; `experts` and `mlp` stay sharded, other axes are gathered.
        trained: names of the parameters that get a gradient.
    """
    experts = next(iter(params.values())).shape[0]

    def compute(rows, owner, params, once=1):
        """Apply the experts in `params` to rows `[M, E]`; rows whose owner is beyond them get zeros."""
        here = next(iter(params.values())).shape[0]
        order = jnp.argsort(owner)
        sizes = jnp.bincount(owner, length=here + 1)[:here].astype(jnp.int32)
        rows = rows.at[order].get(unique_indices=True)
        y = feedforward(Group(rows, sizes, jnp.minimum(owner[order], here - 1), once), params)
        if here < experts:
            y = jnp.where((owner[order] < here)[:, None], y, 0)
        number = jnp.arange(len(order), dtype=jnp.int32)
        place = jnp.zeros_like(number).at[order].set(number, unique_indices=True)  # a second sort would take longer
        return y.at[place].get(unique_indices=True)

    def local(x, chosen, params, once=1, first=0):
        """Apply the experts in `params`, the first of which is number `first`, to all tokens."""
        tokens, d = x.shape
        here = next(iter(params.values())).shape[0]
        owner = chosen.reshape(-1) - first
        if here < experts:
            owner = jnp.where((owner < 0) | (owner >= here), here, owner)
        rows = jnp.broadcast_to(x[:, None], (tokens, chosen.shape[-1], d)).reshape(-1, d)
        return compute(rows, owner, params, once)

    def total(y, weights):
        return jnp.sum(y.reshape(*weights.shape, -1).astype(jnp.float32) * weights[..., None], axis=2)

    mesh = jax.sharding.get_abstract_mesh()
    flat, dtype = (-1, x.shape[-1]), x.dtype
    if mesh.empty or mesh.size == 1:
        return total(local(x.reshape(flat), chosen.reshape(-1, chosen.shape[-1]), params), weights).astype(x.dtype)

    token = PartitionSpec(fitting(mesh, "batch", x.shape[0]), fitting(mesh, "length", x.shape[1]), None)
    places = {
        name: tuple(
            fitting(mesh, axis, size) if axis in ("experts", "mlp") else None
            for axis, size in zip(axes[name], leaf.shape, strict=True)
        )
        for name, leaf in params.items()
    }
    held = {
        name: leaf.placed(places[name], mesh.shape) if isinstance(leaf, Quantized) else PartitionSpec(*places[name])
        for name, leaf in params.items()
    }
    over = next((part for place in places.values() for part in place[1:] if part), None)
    spread = mesh.shape["expert"] > 1 and fitting(mesh, "experts", experts) is not None

    def once():
        return 1 if over is None else (jax.lax.axis_index(over) == 0).astype(dtype)

    def shard(x, chosen, weights, params):
        params = {name: _share(mesh, leaf, places[name]) for name, leaf in params.items()}
        here = next(iter(params.values())).shape[0]
        own, experts_of = x.reshape(flat), chosen.reshape(-1, chosen.shape[-1])
        if spread and token[0] is not None:
            split = [{name: leaf for name, leaf in params.items() if (name in trained) == kept} for kept in (True, False)]

            def run(rows, owner, trained, frozen):
                return compute(rows, owner, {**trained, **frozen}, once())

            y = total(exchanged(own, experts_of, here, run, *split), weights)
        else:
            first = jax.lax.axis_index("expert") * here if spread else 0
            y = total(local(own, experts_of, params, once(), first), weights)
            y = jax.lax.psum(y, "expert") if spread else y
        return (y if over is None else jax.lax.psum(y, over)).astype(x.dtype)

    # check_vma=False: with the check, jax 0.12 cannot type the erf of the exact GELU.
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=(token, token, token, held), out_specs=token, check_vma=False)
    return mapped(x, chosen, weights, params)


def _share(mesh: AbstractMesh, leaf: jax.Array | Quantized, place: Place) -> jax.Array | Quantized:
    """Return what a device has of a parameter, inside of `shard_map`."""
    if not isinstance(leaf, Nf4) or place[-1] is None:
        return leaf
    columns = leaf.columns // math.prod(mesh.shape[axis] for axis in place[-1])
    return leaf.share(columns, jax.lax.axis_index(place[-1]) * columns)


UPDATE = "_update"  # `<weight>_update` holds the low-rank update of a weight of experts


class ExpertMatrices(nnx.Module):
    """Weights of X experts, each with room for a low-rank update.

    Attributes:
        AXES: logical axes of each parameter.
        INPUT_AXES: the axis of the inputs of each weight, in the order of the parameters of transformers' module.
        ADAPTABLE: False if PEFT would take outputs of the weights for inputs, because transformers' module does not tell it.
    """

    AXES: ClassVar[dict[str, tuple[str | None, ...]]]
    INPUT_AXES: ClassVar[dict[str, int]]
    ADAPTABLE: ClassVar[bool] = True

    def leave_room(self) -> None:
        """Make room for updates; to be called once the weights are there."""
        for name in self.INPUT_AXES:
            setattr(self, name + UPDATE, None)

    def routed(
        self, x: Float[Array, "B T D"], chosen: Int[Array, "B T K"], weights: Float[Array, "B T K"], feedforward: Feedforward
    ) -> Float[Array, "B T D"]:
        """Dispatch `x [B, T, D]` to the chosen experts, with weights and updates as parameters of `feedforward`."""
        own, axes = {name: getattr(self, name) for name in self.AXES}, dict(self.AXES)
        params = {name: weight.get_value() for name, weight in own.items()}
        trained = {name for name, weight in own.items() if weight.row.trainable}
        for name in self.INPUT_AXES:
            if (update := getattr(self, name + UPDATE)) is not None:
                params[f"{name}.lora_A"] = update.lora_A[...] * update.scale[...][:, None]
                params[f"{name}.lora_B"] = update.lora_B[...]
                for side in ("lora_A", "lora_B"):
                    trained.add(f"{name}.{side}")
                    row = getattr(update, side).row.axes
                    axes[f"{name}.{side}"] = row[row.index("experts") :]
        return dispatch(x, chosen, weights, feedforward, params, axes, frozenset(trained))

    def product(
        self, group: Group, x: Float[Array, "M _"], params: dict[str, jax.Array | Quantized], name: str, part: int | None = None
    ) -> Float[Array, "M _"]:
        """Multiply rows `[M, in]` by the weight of their expert, and add its update.

        Args:
            part: of outputs that are in several parts.
        """
        weight = params[name]
        inputs, outputs = len(weight.shape) + self.INPUT_AXES[name], params.get(f"{name}.lora_B")
        chosen = None
        if part is not None:  # on the axis before or after that of the inputs
            chosen = Part(2 if inputs == 1 else 1, part)
            inputs -= chosen.axis < inputs
            outputs = None if outputs is None else outputs[:, part]
        y = grouped(x, weight, group.sizes, inputs, chosen)
        if outputs is not None:
            low = grouped(x, params[f"{name}.lora_A"], group.sizes, 2)
            y = y + grouped(low, outputs, group.sizes, 2)
        return y


class Experts(ExpertMatrices):
    """X experts, each `down(act(gate(x)) * up(x))`.

    Checkpoints have one tensor per expert and matrix; transformers' modules concatenate gate and up of all experts in one
    tensor, gate first. Here gate and up are two slices of one array, so that both can be sharded.
    """

    AXES = {"gate_up_proj": ("experts", None, "mlp", "embed"), "down_proj": ("experts", "embed", "mlp")}  # noqa: RUF012
    INPUT_AXES = {"gate_up_proj": -1, "down_proj": -1}  # noqa: RUF012

    def __init__(
        self, embed: int, mlp: int, experts: int, act: str, names: tuple[str, str, str] | None, module: tuple[str, str] | None
    ):
        """Create abstract weights.

        Args:
            names: those of gate, up and down in checkpoints; None if checkpoints have the tensors of transformers' modules.
            module: the part of the module name that differs in checkpoints.
        """
        self.act = activation(act)
        of_two, of_one = (), ()
        if names is not None:
            gate, up, down = names
            of_two, of_one = (
                (Layout("{}.{}.weight", (None, (gate, up)), module),),
                (Layout(f"{{}}.{down}.weight", (None,), module),),
            )
        self.gate_up_proj = param(
            (experts, 2, mlp, embed), self.AXES["gate_up_proj"], "gate_up_proj", hf_shape=(experts, 2 * mlp, embed),
            layouts=of_two,
        )  # fmt: skip
        self.down_proj = param(
            (experts, embed, mlp), self.AXES["down_proj"], "down_proj", layouts=of_one,
        )  # fmt: skip
        self.leave_room()

    def __call__(
        self, x: Float[Array, "B T E"], chosen: Int[Array, "B T k"], weights: Float[Array, "B T k"]
    ) -> Float[Array, "B T E"]:
        def feedforward(group: Group, params: dict[str, jax.Array]) -> jax.Array:
            gate, up = (self.product(group, group.rows, params, "gate_up_proj", part) for part in range(2))
            return self.product(group, self.act(gate) * up, params, "down_proj")

        return self.routed(x, chosen, weights, feedforward)


def statistics(
    logits: Float[Array, "B T X"], chosen: Int[Array, "B T k"], segment_ids: Int[Array, "B T"]
) -> dict[str, Float32[Array, " X"]]:
    """Return sums over all tokens that are not padding (segment 0): how often each expert was chosen, and its probability."""
    real = (segment_ids != 0).astype(jnp.float32)[..., None]
    picked = jnp.sum(jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32), axis=2)
    return {
        "chosen": jnp.sum(picked * real, axis=(0, 1)),
        "probability": jnp.sum(jax.nn.softmax(logits, axis=-1) * real, axis=(0, 1)),
    }


def balance_loss(sums: dict[str, Float[Array, " X"]], layers: int, segment_ids: Int[Array, "B T"]) -> Float[Array, ""]:
    """Compute the load-balancing loss of transformers (`load_balancing_loss_func`).

    It is `X * sum(fraction chosen * mean probability)` over the tokens of all sparse layers together, and equals K if the
    experts are used evenly. Because it is a mean over the tokens of a microbatch (on all devices), it depends on how rows are
    grouped into microbatches; the train step weights each by its number of trained tokens.
    """
    rows = jnp.maximum(layers * jnp.sum(segment_ids != 0), 1).astype(jnp.float32)
    experts = sums["chosen"].shape[0]
    return experts * jnp.sum(sums["chosen"] / rows * sums["probability"] / rows)


class SparseMoe(nnx.Module):
    """A router and its experts, under transformers' names."""

    def __init__(self, router: nnx.Module, experts: nnx.Module, name: str = "gate", shared: nnx.Module | None = None):
        """Hold a router, which is called like `Router`, and its experts.

        Args:
            name: attribute name of the router.
            shared: a feed-forward layer that every token goes through too.
        """
        self.gate = router if name == "gate" else None
        self.router = router if name == "router" else None
        self.experts, self.shared_experts = experts, shared

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> tuple[Float[Array, "B T E"], dict[str, Float32[Array, " X"]]]:
        """Return the output and `statistics`."""
        logits, chosen, weights = (self.gate or self.router)(x)
        y = self.experts(x, chosen, weights)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x, ctx)
        return y, statistics(logits, chosen, ctx.segment_ids)


class SharedMoe(SparseMoe):
    """Experts beside one that every token uses, multiplied by the sigmoid of a gate."""

    def __init__(self, router: Router, experts: nnx.Module, shared: nnx.Module, embed: int):
        super().__init__(router, experts)
        self.shared_expert = shared
        self.shared_expert_gate = Linear(embed, 1, ("embed", "gate"))

    def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, sums = super().__call__(x, ctx)
        return y + jax.nn.sigmoid(self.shared_expert_gate(x, ctx)) * self.shared_expert(x, ctx), sums
