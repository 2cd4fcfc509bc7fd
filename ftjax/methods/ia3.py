"""IA3: learned factors on keys, values and the input of the second feed-forward layer (Liu et al. 2022, arXiv:2205.05638,
section 3.3).

The output of a layer is multiplied, `l * (W x + b)`, or the input of a feed-forward layer, `W (l * x) + b`; factors start at
one. Names, shapes and matching rules are PEFT's.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ftjax.config import IA3Config
from ftjax.errors import UserError
from ftjax.methods.method import Method
from ftjax.methods.parted import part_stacks
from ftjax.methods.save import names_to_save, refuse_missing, train_names
from ftjax.methods.walk import Site, describe, excluded_modules, linears, matches, refuse_unmatched
from ftjax.models.model import Model
from ftjax.models.nn.context import Context
from ftjax.models.nn.param import Buffer, Init, Row, param

# Keys, values (or the projection that contains them) and the second feed-forward layer, by the families' names.
OUTPUTS = ("k_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
INPUTS = ("down_proj", "mlp.c_proj", "dense_4h_to_h")


class IA3Linear(nnx.Module):
    """A frozen Linear with scaled output (or, for a feed-forward layer, input); layers without factors are unchanged."""

    def __init__(self, site: Site, chosen: np.ndarray, feedforward: bool):
        """`chosen`: [layers] bool."""
        self.base, self.feedforward = site.layer, feedforward
        axis_in, axis_out = site.layer.axes
        shape, axes = ((1, site.layer.size_in), ("rank", axis_in)) if feedforward else (
            (site.layer.size_out, 1), (axis_out, "rank")
        )  # fmt: skip
        self.ia3_l = param(
            (*site.stack, *shape), (*site.stack_axes, *axes), "ia3_l", init=Init("ones"), trainable=True, adapter=True,
            ranks=tuple(map(int, chosen)),
        )  # fmt: skip
        self.on = Buffer(chosen.reshape(site.stack), row=Row(site.stack_axes, "on"))

    def without_adapter(self) -> nnx.Module:
        """Return the module to put here when the method is removed."""
        return self.base

    def __call__(self, x: Float[Array, "*of I"], ctx: Context) -> Float[Array, "*of O"]:
        factor = jnp.where(self.on[...], self.ia3_l[...].reshape(-1), 1).astype(x.dtype)
        return self.base(x * factor, ctx) if self.feedforward else self.base(x, ctx) * factor


def attach(root: nnx.Module, config: IA3Config) -> None:
    """Wrap every matching dense layer of an abstract model, in place.

    Raises UserError, naming what the model has, if a target matches nothing.
    """
    refuse_missing(root, config.modules_to_save)
    saved = names_to_save(root, config.modules_to_save)
    part_stacks(root, saved)
    sites = [site for site in linears(root) if site.path != root.output]
    names = [name for site in sites for name in site.names]
    targets, inputs = _targets(config, names), _inputs(config, names)
    for option, wanted in (("target_modules", targets), ("feedforward_modules", inputs)):
        if isinstance(wanted, list):
            refuse_unmatched(f"method.{option}", wanted, names)
    found = False
    for site in sites:
        chosen = np.array([_chosen(name, targets, config) for name in site.names])
        if not chosen.any():
            continue
        kinds = {matches(name, inputs) for name, one in zip(site.names, chosen, strict=True) if one}
        if len(kinds) > 1:
            raise UserError(
                f"method.feedforward_modules: {config.feedforward_modules!r} matches {site.names[0].split('.')[-1]} "
                "in some layers and not in others; name all of them or none"
            )
        site.replace(IA3Linear(site, chosen, kinds.pop()))
        found = True
    if not found:
        raise UserError(f"method.target_modules: {targets!r} matches no linear layer; the model has {describe(iter(names))}")
    train_names(root, saved)


def _targets(config: IA3Config, names: list[str]) -> str | list[str]:
    if config.target_modules == "all-linear":
        return sorted({name.rsplit(".", 1)[-1] for name in names})
    if config.target_modules is not None:
        return config.target_modules
    return [one for one in (*OUTPUTS, *INPUTS) if any(matches(name, [one]) for name in names)]


def _inputs(config: IA3Config, names: list[str]) -> str | list[str]:
    if config.feedforward_modules is not None:
        return config.feedforward_modules
    return [one for one in INPUTS if any(matches(name, [one]) for name in names)]


def _chosen(name: str, targets: str | list[str], config: IA3Config) -> bool:
    if config.exclude_modules and matches(name, config.exclude_modules):
        return False
    return matches(name, targets)


def merged(model: Model, path: str, index: tuple, weight: np.ndarray, fetch: Callable[[str, tuple], np.ndarray]) -> np.ndarray:
    """Multiply one base weight, or bias, by the factors, in float32."""
    layer, found, part = path.rpartition(".base.")
    if not found or f"{layer}.ia3_l" not in model.specs or not model.buffers[f"{layer}.on"][index]:
        return weight
    factor = fetch(f"{layer}.ia3_l", index).astype(np.float32)  # (out, 1) or (1, in): broadcasts against a weight (out, in)
    if part == "bias":
        return weight if _feedforward(model, layer) else weight.astype(np.float32) * factor[:, 0]
    return weight.astype(np.float32) * (factor.T if _is_conv1d(model, layer) else factor)


def _feedforward(model: Model, layer: str) -> bool:
    return model.specs[f"{layer}.ia3_l"].row.axes[-2] == "rank"


def _is_conv1d(model: Model, layer: str) -> bool:
    """Return whether the wrapped weight is stored (in, out), as in GPT-2."""
    own, weight = model.specs[f"{layer}.ia3_l"].row.axes, model.specs[f"{layer}.base.weight"].row.axes
    return weight[-2] == own[-1] if _feedforward(model, layer) else weight[-1] == own[-2]


def saved_config(config: IA3Config, base_model: str, model: Model) -> dict:
    """Return adapter_config.json for PEFT, with the module names that the defaults resolved to."""
    layers = [path.removesuffix(".ia3_l") for path in model.specs if path.endswith(".ia3_l")]
    own = {layer: [piece.name.removesuffix(".ia3_l") for piece in model.specs[f"{layer}.ia3_l"].pieces()] for layer in layers}
    names = [name for layer in layers for name in own[layer]]
    inputs = [name for layer in layers if _feedforward(model, layer) for name in own[layer]]
    targets, feedforward = config.target_modules, config.feedforward_modules
    if targets is None or targets == "all-linear":
        targets = _targets(config, names)
    if feedforward is None:
        feedforward = _inputs(config, inputs)
    return {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": targets,
        "exclude_modules": excluded_modules(config.exclude_modules, model),
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(_is_conv1d(model, layer) for layer in layers),
        "modules_to_save": config.modules_to_save or None,
        "init_ia3_weights": True,
    }


def from_saved(config: IA3Config, saved: dict) -> IA3Config:
    """Return the settings of a PEFT folder."""
    keys = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")
    values = {key: saved[key] for key in keys if saved.get(key) is not None}
    return IA3Config(**values, adapter_path=config.adapter_path)


METHOD = Method(
    IA3Config,
    attach,
    reads=lambda saved: saved.get("peft_type") == "IA3",
    kind="IA3",
    saved_config=saved_config,
    from_saved=from_saved,
    known=frozenset(
        ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "fan_in_fan_out", "init_ia3_weights")
    ),
    merged=merged,
)
