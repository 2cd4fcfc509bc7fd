"""Bottleneck adapters: `o' = o + s W_up act(W_down z)` on the output of a sublayer, in AdapterHub's format.

The three differ in their input z, with x the residual stream before the sublayer and o the sublayer's output:

    seq_bn         z = x + o  after the feed-forward        Pfeiffer et al. 2020, arXiv:2005.00247
    double_seq_bn  z = o      after both sublayers          Houlsby et al. 2019, arXiv:1902.00751, figure 2
    par_bn         z = x      beside the feed-forward       He et al. 2021, arXiv:2110.04366, eq. 10

Names, defaults and initialisation are those of the `adapters` library (Poth et al. 2023, arXiv:2311.11077), which loads the
folder: `load_adapter(FOLDER, use_safetensors=True)`. The block adds o' to the residual stream in place of o.

Legend: B batch, T length, E embed, R width of the bottleneck.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.config import BottleneckConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from ftjax.errors import UserError
from ftjax.methods.method import Method
from ftjax.models.model import Model
from ftjax.models.nn.context import Context
from ftjax.models.nn.layers import ACTIVATIONS, IdentityAdapter, project
from ftjax.models.nn.param import Init, param
from ftjax.models.nn.stack import Stack


@dataclass(frozen=True)
class Kind:
    """Differences of the three architectures.

    Attributes:
        reads: the input of the bottleneck.
        places: the attributes of a block that get a bottleneck.
        zeros: the up-projection starts at zero, so that training starts from the base model (`mam_adapter`); otherwise both
            projections start from a normal distribution of 0.02 (`bert`).
    """

    reads: Literal["sum", "result", "stream"]
    places: tuple[str, ...]
    zeros: bool = False

    @property
    def saved(self) -> dict[str, Any]:
        """The keys of the `adapters` library's configuration that define this kind."""
        parallel = self.reads == "stream"
        return {
            "original_ln_before": self.reads == "sum",
            "is_parallel": parallel,
            "mh_adapter": "attention_adapters" in self.places,
            "output_adapter": "output_adapters" in self.places,
            "init_weights": "mam_adapter" if self.zeros else "bert",
        }


# The other keys of the library's configuration, each at the only value that ftjax supports.
FIXED = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "factorized_phm_W": True, "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform", "init_weights_seed": None, "inv_adapter": None,
    "inv_adapter_reduction_factor": None, "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False,
    "original_ln_after": True, "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001,
    "phm_layer": False, "phm_rank": 1, "residual_before_ln": True, "shared_W_phm": False, "shared_phm_rule": True,
    "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
# Keys of these that have an effect only with options that ftjax refuses, or only on a fresh adapter.
WITHOUT_EFFECT = {key for key in FIXED if "phm" in key.lower()} - {"phm_layer"} | {
    "hypercomplex_nonlinearity", "init_weights_seed", "inv_adapter_reduction_factor", "adapter_residual_before_ln",
}  # fmt: skip


class Bottleneck(nnx.Module):
    """Replaces `IdentityAdapter` in a block."""

    def __init__(self, path: str, size: int, count: int | None, kind: Kind, config: BottleneckConfig):
        """`count`: layers stacked in the block; None for a block that is not stacked."""
        self.reads, self.scaling, self.dropout = kind.reads, config.scaling, config.dropout
        self.act = ACTIVATIONS[config.non_linearity]
        self.salt = zlib.crc32(path.encode())  # layers of one block draw different dropout masks
        width = max(1, int(size // config.reduction_factor))
        stack, axes = ((), ()) if count is None else ((count,), ("layers",))
        down = Init("uniform", 1 / math.sqrt(size)) if kind.zeros else Init("normal", 0.02)
        up = Init("zeros") if kind.zeros else Init("normal", 0.02)
        name, row = f"adapters.{config.adapter_name}", {"trainable": True, "adapter": True}
        self.down = param((*stack, width, size), (*axes, "rank", "embed"), f"{name}.adapter_down.0.weight", init=down, **row)
        self.down_bias = param((*stack, width), (*axes, "rank"), f"{name}.adapter_down.0.bias", init=Init("zeros"), **row)
        self.up = param((*stack, size, width), (*axes, "embed", "rank"), f"{name}.adapter_up.weight", init=up, **row)
        self.up_bias = param((*stack, size), (*axes, "embed"), f"{name}.adapter_up.bias", init=Init("zeros"), **row)

    def without_adapter(self) -> nnx.Module:
        """Return the module to put here when the method is removed."""
        return IdentityAdapter()

    def __call__(self, x: Float[Array, "B T E"], o: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        """Apply the bottleneck, x and o `[B, T, E] -> o' [B, T, E]`."""
        z = {"sum": x + o, "result": o, "stream": x}[self.reads]
        h = self.act(project(z, self.down[...]) + self.down_bias[...].astype(z.dtype))
        up = (project(h, self.up[...]) + self.up_bias[...].astype(z.dtype)) * self.scaling
        if self.dropout and ctx.dropout is not None:
            keep = jax.random.bernoulli(jax.random.fold_in(ctx.dropout, self.salt), 1 - self.dropout, up.shape)
            up = jnp.where(keep, up / (1 - self.dropout), 0)
        return o + up.astype(o.dtype)


def make_method(name: str, section: type[BottleneckConfig], kind: Kind) -> Method:
    """Build the method of one of the three kinds."""

    def attach(root: nnx.Module, config: BottleneckConfig) -> None:
        """Add a bottleneck to every block, in place."""
        if config.non_linearity not in ACTIVATIONS:
            raise UserError(
                f"method.non_linearity: {config.non_linearity!r} is not supported; those that are: "
                f"{', '.join(sorted(ACTIVATIONS))}"
            )
        nodes = {path: node for path, node in nnx.iter_graph(root) if isinstance(node, nnx.Module)}
        size = root.sizes.embed
        for path, node in nodes.items():
            if isinstance(node, IdentityAdapter) and path[-1] in kind.places:
                above = next((path[:end] for end in range(len(path)) if isinstance(nodes.get(path[:end]), Stack)), None)
                count = None if above is None else len(nodes[above].layers_of(str(path[len(above)])))
                setattr(nodes[path[:-1]], str(path[-1]), Bottleneck(".".join(map(str, path)), size, count, kind, config))

    def saved_config(config: BottleneckConfig, base_model: str, model: Model) -> dict[str, Any]:
        """Return adapter_config.json as `save_adapter` writes it."""
        values = {key: getattr(config, key) for key in ("reduction_factor", "non_linearity", "scaling", "dropout")}
        architectures = model.config.get("architectures") or [None]
        return {
            "config": {**FIXED, **kind.saved, **values},
            "hidden_size": model.sizes.embed,
            "model_class": architectures[0],
            "model_name": base_model,
            "model_type": model.config["model_type"],
            "name": config.adapter_name,
            "version": "adapters.1.3.0",
        }

    def reads(saved: Mapping[str, Any]) -> bool:
        config = saved.get("config")
        return (
            "peft_type" not in saved
            and isinstance(config, Mapping)
            and all(config.get(key) == value for key, value in kind.saved.items() if key != "init_weights")
        )

    def from_saved(config: BottleneckConfig, saved: dict[str, Any]) -> BottleneckConfig:
        """Return the settings of an AdapterHub folder. Raises UserError for what ftjax does not support."""
        found = saved["config"]
        neutral = {key: value for key, value in FIXED.items() if key not in WITHOUT_EFFECT}
        odd = [f"{key} = {found[key]!r}" for key, value in neutral.items() if (found.get(key) or None) != (value or None)]
        for key in ("reduction_factor", "scaling"):
            if not isinstance(found.get(key), int | float):
                odd.append(f"{key} = {found.get(key)!r}")
        if odd:
            raise UserError(f"{config.adapter_path}: adapter_config.json asks for {', '.join(odd)}, which is not supported")
        values = {key: found[key] for key in ("reduction_factor", "non_linearity", "scaling")}
        return section(**values, adapter_name=saved["name"], dropout=config.dropout, adapter_path=config.adapter_path)

    return Method(
        section,
        attach,
        reads=reads,
        kind=name,
        saved_config=saved_config,
        from_saved=from_saved,
        weights_file="adapter.safetensors",
        file_name=lambda model, spec, piece: piece.name,
        no_merge=f"{name} has an activation between its two matrices, so that no weight of the base model can hold it",
        library="adapters",
    )


SEQ_BN = make_method("seq_bn", SeqBnConfig, Kind("sum", ("output_adapters",)))
DOUBLE_SEQ_BN = make_method("double_seq_bn", DoubleSeqBnConfig, Kind("result", ("attention_adapters", "output_adapters")))
PAR_BN = make_method("par_bn", ParBnConfig, Kind("stream", ("output_adapters",), zeros=True))
