"""Prefix tuning: keys and values of virtual tokens, learned for every layer (Li and Liang 2021, arXiv:2101.00190, section 4).

With `prefix_projection` a two-layer MLP computes them from small embeddings during training (section 4.3); the file stores its
output. Layout and names are PEFT's: one tensor `[V, L * 2 * K * H]`, in which layer l has its keys at 2l and its values at 2l +
1. Keys are added after RoPE.

Legend: V virtual tokens, L layers, K kv heads, H head dim, D = K H, C hidden size of the MLP.
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ftjax.config import PrefixTuningConfig
from ftjax.methods.method import Fetch, Method, Stored
from ftjax.models.model import Model
from ftjax.models.nn.context import Context, Prefix
from ftjax.models.nn.layers import project
from ftjax.models.nn.memory import KeysValues, one_for_all
from ftjax.models.nn.param import Init, Piece, Spec, param
from ftjax.models.nn.stack import memories

TENSOR = "prompt_embeddings"
NO_MERGE = "virtual tokens come before the text and are not part of any weight"


class PrefixTokens(nnx.Module):
    """`Prefix` of a model whose layers all remember `remembered`."""

    def __init__(self, layers: int, remembered: KeysValues, config: PrefixTuningConfig):
        self.count, self.remembered, dim = layers, remembered, remembered.kv_heads * remembered.key_dim
        wide = layers * 2 * dim
        self.projected = config.prefix_projection
        zero = config.init_weights == "zero"
        if not self.projected:
            self.embedding = own((config.num_virtual_tokens, wide), "embedding", Init("zeros" if zero else "normal"))
            return
        hidden = config.encoder_hidden_size or dim
        self.embedding = own((config.num_virtual_tokens, dim), "embedding", Init("normal"))
        self.weight_0, self.bias_0 = dense(dim, hidden, 0)
        self.weight_2, self.bias_2 = dense(hidden, wide, 2, zero=zero)

    def flat(self) -> Float[Array, "virtual all"]:
        """Return the keys and values of all layers, `L * 2 * D` numbers for each virtual token."""
        if not self.projected:
            return self.embedding[...]
        x = jnp.tanh(project(self.embedding[...], self.weight_0[...]) + self.bias_0[...])
        return project(x, self.weight_2[...]) + self.bias_2[...]

    def __call__(self, root: nnx.Module, ctx: Context) -> Prefix:
        shape = self.count, 2, self.remembered.kv_heads, self.remembered.key_dim
        parts = self.flat().astype(ctx.dtype).reshape(-1, *shape).transpose(2, 1, 0, 3, 4)
        return Prefix(parts[0], parts[1])


def own(shape: tuple[int, ...], name: str, init: Init):
    return param(shape, (None,) * len(shape), name, init=init, trainable=True, adapter=True)


def dense(size_in: int, size_out: int, number: int, *, zero: bool = False) -> tuple[nnx.Param, nnx.Param]:
    """Build weight (out, in) and bias of a layer of the MLP, initialised like torch.nn.Linear."""
    init = Init("zeros") if zero else Init("uniform", 1 / math.sqrt(size_in))
    return own((size_out, size_in), f"weight_{number}", init), own((size_out,), f"bias_{number}", init)


def attach(root: nnx.Module, config: PrefixTuningConfig) -> None:
    """Add virtual tokens before every text to an abstract model, in place."""
    put(root, PrefixTokens(root.sizes.layers, one_for_all(memories(root)), config), config.num_virtual_tokens)


def put(root: nnx.Module, virtual: nnx.Module, count: int) -> None:
    """Set a method's virtual tokens, in place; they reduce the positions that are left for the text."""
    root.virtual = virtual
    if root.max_positions is not None:
        root.max_positions -= count


def file_name(model: Model, spec: Spec, piece: Piece) -> str:
    return TENSOR


def stored_by(make) -> object:
    """Build `Method.stored` for virtual tokens: the one tensor is `make(module)`, however it is computed during training."""

    def stored(config, model: Model, fetch: Fetch) -> Iterator[Stored]:
        params = {path: jnp.asarray(fetch(path, ())) for path in model.trainable}
        rest = {path: spec.abstract for path, spec in model.specs.items() if path not in params}
        value = np.asarray(make(model.bind({**rest, **params}).virtual))
        yield Stored(TENSOR, value.shape, lambda: value)

    return stored


def saved_config(config: PrefixTuningConfig, base_model: str, model: Model) -> dict:
    """Return adapter_config.json for PEFT."""
    remembered = one_for_all(model.memories)
    dim = remembered.kv_heads * remembered.key_dim
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "num_layers": model.sizes.layers,
        "num_attention_heads": remembered.kv_heads,
        "token_dim": dim,
        "encoder_hidden_size": config.encoder_hidden_size or dim,
        "prefix_projection": config.prefix_projection,
    }


def from_saved(config: PrefixTuningConfig, saved: dict) -> PrefixTuningConfig:
    """Return the settings of a PEFT folder, which stores the output of an MLP, not the MLP."""
    return PrefixTuningConfig(num_virtual_tokens=saved["num_virtual_tokens"], adapter_path=config.adapter_path)


VIRTUAL = ("num_virtual_tokens", "num_transformer_submodules", "num_layers", "num_attention_heads", "token_dim")
METHOD = Method(
    PrefixTuningConfig,
    attach,
    reads=lambda saved: saved.get("peft_type") == "PREFIX_TUNING",
    kind="PREFIX_TUNING",
    saved_config=saved_config,
    from_saved=from_saved,
    known=frozenset((*VIRTUAL, "encoder_hidden_size", "prefix_projection", "init_weights")),
    file_name=file_name,
    stored=stored_by(PrefixTokens.flat),
    no_merge=NO_MERGE,
)
