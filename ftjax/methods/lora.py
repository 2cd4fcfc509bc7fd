"""LoRA: `y = W x + scale * B A x` with A (r, in) and B (out, r) (Hu et al. 2021, arXiv:2106.09685, eq. 3).

Scale is `alpha / r`, or `alpha / sqrt(r)` with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732). With DoRA (Liu et al. 2024,
arXiv:2402.09353, eq. 5 and section 4.3) the weight is `m (W + scale * B A) / ||W + scale * B A||`, with a norm for each output
that is a constant for the gradient. Names, matching rules, initialisation and scaling are PEFT's, so that an adapter means the
same there and here.

Legend: L layers, I in, O out, R rank (the largest of the layers that are stacked together).
"""

import math
import re
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ftjax.config import LoraConfig
from ftjax.errors import UserError
from ftjax.methods.method import Method, Start
from ftjax.methods.save import mark_modules_to_save
from ftjax.methods.walk import Site, describe, layer_index, linears, matches, refuse_unmatched
from ftjax.models.classifier import HEAD
from ftjax.models.context import Context
from ftjax.models.layers import project, project_sharded, widen
from ftjax.models.model import Model
from ftjax.models.param import Buffer, Init, Row, param
from ftjax.models.quantized import Quantized


def _cut(axis: str | None) -> str | None:
    """The logical axis of an adapter's matrix along a dimension of its layer."""
    return "wide" if axis in ("heads", "kv_heads", "mlp") else axis


class LoraLinear(nnx.Module):
    """A frozen Linear plus its low-rank update; layers may differ in rank and scale, zero for layers without an adapter."""

    def __init__(self, site: Site, ranks: np.ndarray, scales: np.ndarray, dropout: float, dora: bool = False):
        """`ranks` and `scales`: one for each stacked index."""
        self.base = base = site.linear
        self.dropout = dropout
        self.salt = zlib.crc32(site.path.encode())  # layers of one block draw different dropout masks
        rank = int(ranks.max())
        row = {"trainable": True, "adapter": True, "ranks": tuple(map(int, ranks))}
        axes_in, axes_out = (_cut(axis) for axis in base.axes)
        self.axes_A, self.axes_B = ("rank", axes_in), (axes_out, "rank")
        self.lora_A = param(
            (*site.stack, rank, base.size_in), (*site.stack_axes, *self.axes_A), "lora_A.weight",
            init=Init("uniform", 1 / math.sqrt(base.size_in)), **row,
        )  # fmt: skip
        self.lora_B = param(
            (*site.stack, base.size_out, rank), (*site.stack_axes, *self.axes_B), "lora_B.weight", init=Init("zeros"), **row
        )
        self.lora_magnitude_vector = None
        if dora:  # `start` gives it the base weight's norms
            shape, axes = (*site.stack, base.size_out), (*site.stack_axes, base.axes[1])
            self.lora_magnitude_vector = param(shape, axes, "lora_magnitude_vector", init=Init("ones"), **row)
        scale = np.where(np.arange(rank) < ranks[:, None], scales[:, None], 0).astype(np.float32)
        self.scale = Buffer(scale.reshape(*site.stack, rank), row=Row((*site.stack_axes, "rank"), "scale"))

    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        dropped = self._drop(x, ctx)
        low = project_sharded(dropped, self.lora_A[...], self.axes_A, ctx) * self.scale[...].astype(x.dtype)
        update = project_sharded(low, self.lora_B[...], self.axes_B, ctx, widen)
        if self.lora_magnitude_vector is None:
            return self.base(x, ctx) + update
        y = self.base(x, ctx)
        direct = y if dropped is x else self.base(dropped, ctx)  # what is scaled sees the same dropout as the update
        if self.base.bias is not None:
            direct = direct - self.base.bias[...].astype(x.dtype)
        adapted = jnp.any(self.scale[...] != 0)
        factor = jnp.where(adapted, self.lora_magnitude_vector[...] / jax.lax.stop_gradient(self._norm()), 1)
        return y + ((factor - 1) * direct + factor * update).astype(x.dtype)

    def _drop(self, x: jax.Array, ctx: Context) -> jax.Array:
        if not self.dropout or ctx.dropout is None:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(ctx.dropout, self.salt), 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)

    def _norm(self) -> jax.Array:
        """`||W + B diag(scale) A||` for each output [O], float32, without a matrix of W's size:
        `||w + b A||^2 = ||w||^2 + 2 w A^T b + b A A^T b` for a row w of W and b of `B diag(scale)`."""
        weight = self.base.weight.get_value()
        weight = weight.dequantise(jnp.float32) if isinstance(weight, Quantized) else weight.astype(jnp.float32)
        lora_A, scaled_B = self.lora_A[...], self.lora_B[...] * self.scale[...]
        own = jnp.sum(jnp.square(weight), axis=0 if self.base.conv1d else 1)
        cross = project(lora_A, weight, conv1d=self.base.conv1d).T
        both = project(scaled_B, project(lora_A, lora_A))
        return jnp.sqrt(jnp.maximum(own + jnp.sum((2 * cross + both) * scaled_B, axis=1), 1e-30))


def merged(model: Model, path: str, index: tuple, weight: np.ndarray, fetch: Callable[[str, tuple], np.ndarray]) -> np.ndarray:
    """One base weight with its update added in float32: `W + B diag(scale) A`.

    Args:
        path: the base weight's path, `<layer>.base.weight`; other weights come back as they are.
        index: which of the stacked layers.
        fetch: gives a part of an adapter parameter by path and index.
    """
    layer, found, _ = path.rpartition(".base.weight")
    if not found or f"{layer}.lora_A" not in model.specs:
        return weight
    lora_A, lora_B = (fetch(f"{layer}.{name}", index).astype(np.float32) for name in ("lora_A", "lora_B"))
    update = (lora_B * model.buffers[f"{layer}.scale"][index]) @ lora_A
    conv1d = is_conv1d(model, layer)
    weight = weight.astype(np.float32) + (update.T if conv1d else update)
    if f"{layer}.lora_magnitude_vector" in model.specs and model.buffers[f"{layer}.scale"][index].any():
        factor = fetch(f"{layer}.lora_magnitude_vector", index) / np.linalg.norm(weight, axis=0 if conv1d else 1)
        weight = weight * (factor if conv1d else factor[:, None])
    return weight


def start(config: LoraConfig, model: Model, begin: Start) -> dict[str, np.ndarray]:
    """What the rows' initialisers do not give: other beginnings of A and B, and DoRA's magnitudes, the norms of the base
    weight, to which `B A = 0` adds nothing."""
    found = {} if config.init_lora_weights is True else _factors(config.init_lora_weights, model, begin.seed)
    for path, spec in model.specs.items():
        layer, is_magnitude, _ = path.rpartition(".lora_magnitude_vector")
        if not is_magnitude:
            continue
        axis = 0 if is_conv1d(model, layer) else 1
        norms = [
            np.linalg.norm(begin.fetch(f"{layer}.base.weight", index).astype(np.float32), axis=axis)
            for index in np.ndindex(spec.stacked)
        ]
        found[path] = np.stack(norms).reshape(spec.shape)
    return found


def _factors(kind: str, model: Model, seed: int) -> dict[str, np.ndarray]:
    """A and B of all layers as PEFT's `init_lora_weights` of that name draws them.

    `orthogonal`: rows of a random orthogonal matrix alternate between A's and B's mixing, so that `B A = 0` although neither
    is zero. Raises UserError for an odd rank there.
    """
    found = {}
    for path, spec in model.specs.items():
        layer, is_a, _ = path.rpartition(".lora_A")
        if not is_a:
            continue
        spec_b = model.specs[f"{layer}.lora_B"]
        lora_A, lora_B = np.zeros(spec.shape, np.float32), np.zeros(spec_b.shape, np.float32)
        size_in, size_out = spec.shape[-1], spec_b.shape[-2]
        for rank, index in zip(spec.row.ranks, np.ndindex(spec.stacked), strict=True):
            rng = np.random.default_rng((seed, zlib.crc32(path.encode()), *index))
            if not rank:
                continue
            if kind == "gaussian":
                lora_A[index][:rank] = rng.normal(size=(rank, size_in)) / rank
                continue
            if rank % 2:
                raise UserError(f"method.init_lora_weights: orthogonal needs an even rank, and {layer} has {rank}")
            q, _ = np.linalg.qr(rng.normal(size=(rank, rank)))
            lora_A[index][:rank] = (rng.normal(size=(size_in, rank // 2)) @ q[0::2]).T / 10
            lora_B[index][:, :rank] = rng.normal(size=(size_out, rank // 2)) @ q[1::2] / 10
        found[path], found[f"{layer}.lora_B"] = lora_A, lora_B
    return found


def is_conv1d(model: Model, layer: str) -> bool:
    """Whether the weight that a LoRA layer wraps is stored (in, out), as GPT-2's are."""
    axis_in = model.specs[f"{layer}.lora_A"].row.axes[-1]
    axis_out = model.specs[f"{layer}.lora_B"].row.axes[-2]
    return tuple(map(_cut, model.specs[f"{layer}.base.weight"].row.axes[-2:])) == (axis_in, axis_out)


def attach(root: nnx.Module, config: LoraConfig) -> None:
    """Wrap every matching dense layer of an abstract model, in place.

    Raises UserError, naming what the model has, where a target or pattern matches nothing.
    """
    sites = linears(root)
    names = [name for site in sites for name in site.names]
    _check(config, names)
    targets = config.target_modules
    wrapped: list[str] = []
    for site in sites:
        ranks = np.array([_rank(name, config, targets) for name in site.names])
        if not ranks.any():
            continue
        wrapped += [name for name, rank in zip(site.names, ranks, strict=True) if rank]
        scales = np.array([scale_of(name, rank, config) if rank else 0 for name, rank in zip(site.names, ranks, strict=True)])
        site.replace(LoraLinear(site, ranks, scales, config.lora_dropout, config.use_dora))
    if not wrapped:
        raise UserError(f"method.target_modules: {targets!r} matches no linear layer; the model has {describe(iter(names))}")
    for option in ("rank_pattern", "alpha_pattern"):
        unused = [key for key in getattr(config, option) if not any(_fits(key, name) for name in wrapped)]
        if unused:
            raise UserError(f"method.{option}: {', '.join(map(repr, unused))} matches none of {describe(iter(wrapped))}")
    mark_modules_to_save(root, saved_modules(config, root.output))


def saved_modules(config: LoraConfig, output: str) -> list[str]:
    """`modules_to_save`; a classification head is always one of them, as in PEFT."""
    return list(dict.fromkeys([*config.modules_to_save, *([HEAD] if output == HEAD else [])]))


def _rank(name: str, config: LoraConfig, targets: str | list[str]) -> int:
    """The rank of one module; 0 where it is not adapted."""
    if config.exclude_modules and matches(name, config.exclude_modules):
        return 0
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.modules_to_save):
        return 0
    if targets == "all-linear":
        if name == "lm_head":  # PEFT leaves the output embedding out
            return 0
    elif not matches(name, targets):
        return 0
    if config.layers_to_transform is not None:
        layers = config.layers_to_transform
        if layer_index(name) not in (layers if isinstance(layers, list) else [layers]):
            return 0
    return _pattern(name, config.rank_pattern, config.r)


def scale_of(name: str, rank: int, config: LoraConfig) -> float:
    """The factor on a module's update."""
    alpha = _pattern(name, config.alpha_pattern, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _fits(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _pattern(name: str, patterns: dict, default):
    found = {key: value for key, value in patterns.items() if _fits(key, name)}
    if len(set(found.values())) > 1:
        raise UserError(
            f"method: rank_pattern or alpha_pattern gives {name} several values ({found}); tools differ in which one they "
            "take, so make the patterns exclude each other"
        )
    return next(iter(found.values()), default)


def _check(config: LoraConfig, names: list[str]) -> None:
    if isinstance(config.target_modules, list):
        refuse_unmatched("method.target_modules", config.target_modules, names)
    if config.layers_to_transform is not None:
        if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
            raise UserError("method.layers_to_transform needs target_modules as a list (PEFT refuses it beside a regex)")
        layers = config.layers_to_transform if isinstance(config.layers_to_transform, list) else [config.layers_to_transform]
        exist = {layer_index(name) for name in names} - {None}
        if not set(layers) <= exist:
            absent = sorted(set(layers) - exist)
            raise UserError(f"method.layers_to_transform: {absent} do not exist; layers are 0 to {max(exist)}")


def saved_config(config: LoraConfig, base_model: str, model: Model) -> dict:
    """adapter_config.json for PEFT; `all-linear` is written out as the names that it came to.

    Args:
        base_model: what `base_model_name_or_path` says.
    """
    targets = config.target_modules
    layers = [path.removesuffix(".lora_A") for path in model.specs if path.endswith(".lora_A")]
    if targets == "all-linear":
        targets = sorted({spec.module.rsplit(".", 1)[-1] for spec in model.specs.values() if spec.row.name == "lora_A.weight"})
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.output == HEAD else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "exclude_modules": config.exclude_modules,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "layers_to_transform": config.layers_to_transform,
        "modules_to_save": saved_modules(config, model.output) or None,
        "fan_in_fan_out": any(is_conv1d(model, layer) for layer in layers),
        "bias": "none",
        "init_lora_weights": True,
    }


def from_saved(config: LoraConfig, saved: dict) -> LoraConfig:
    """The settings of a PEFT folder, for starting from it. Raises UserError for what ftjax's LoRA does not have."""
    neutral = {"bias": ("none",), "target_parameters": (None, []), "layers_pattern": (None, [])}
    neutral |= {"trainable_token_indices": (None, [], {}), "lora_bias": (False, None), "alora_invocation_tokens": (None,)}
    odd = [f"{key} = {saved[key]!r}" for key, allowed in neutral.items() if key in saved and saved[key] not in allowed]
    if odd:
        raise UserError(f"{config.adapter_path}: adapter_config.json asks for {', '.join(odd)}, which is not supported")
    kind = str(saved.get("init_lora_weights")).lower()
    if kind.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(
            f"{config.adapter_path}: adapter_config.json says init_lora_weights = {kind}, which changed the base model as "
            "well; save it from PEFT as a plain LoRA (path_initial_model_for_weight_conversion) and use that folder"
        )
    keys = ("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora", "rank_pattern")
    keys += ("alpha_pattern", "layers_to_transform", "modules_to_save")
    values = {key: saved[key] for key in keys if saved.get(key) is not None}
    if saved.get("task_type") == "SEQ_CLS":  # PEFT names the heads of all its models; this one's is added by itself
        heads = ("classifier", HEAD)
        values["modules_to_save"] = [name for name in values.get("modules_to_save", ()) if name not in heads]
    return LoraConfig(**values, lora_dropout=config.lora_dropout, adapter_path=config.adapter_path)


METHOD = Method(
    LoraConfig,
    attach,
    reads=lambda saved: saved.get("peft_type") == "LORA",
    kind="LORA",
    saved_config=saved_config,
    from_saved=from_saved,
    start=start,
    merged=merged,
)
