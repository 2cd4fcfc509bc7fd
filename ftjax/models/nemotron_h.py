"""Nemotron-H and Nemotron 3: each layer is Mamba-2, attention without position embeddings, an MLP with squared ReLU, or experts
(NVIDIA 2025, arXiv:2504.03624, arXiv:2512.20848).

Source: transformers, models/nemotron_h/modeling_nemotron_h.py.

Legend: B batch, T length, E embed, F mlp, X experts, k experts per token.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.bamba import checked
from ftjax.models.causal_lm import Sizes
from ftjax.models.deepseek_v3 import corrected_router
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaAttention, LlamaForCausalLM, LlamaModel, attention
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.chunks import feed_forward
from ftjax.models.nn.context import Context, Tokens
from ftjax.models.nn.experts import ExpertMatrices, Group
from ftjax.models.nn.group_router import GroupRouter
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, Linear, RMSNorm, activation
from ftjax.models.nn.mamba2 import GatedGroupNorm, Mamba2, MambaSizes
from ftjax.models.nn.param import Layout, param, variables
from ftjax.models.nn.remat import projected
from ftjax.models.nn.stack import Stack

TYPES = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp", "moe": "moe"}
OF_EXPERTS = (
    "moe_intermediate_size", "moe_latent_size", "moe_shared_expert_intermediate_size", "n_group", "n_routed_experts",
    "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group",
)  # fmt: skip
STORED = ("model.", "backbone.")  # checkpoints use the name of NVIDIA's code
# What releases of transformers 5 wrote until huggingface/transformers#48075.
SINGULAR = Layout("weight", module=("model.embeddings", "backbone.embedding"))


class NemotronMLP(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(self, embed: int, mlp: int, act: str, bias: bool):
        self.act = activation(act)
        self.up_proj = Linear(embed, mlp, ("embed", "mlp"), bias=bias)
        self.down_proj = Linear(mlp, embed, ("mlp", "embed"), bias=bias)

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        return feed_forward(self, x, ctx)

    def all_at_once(self, x: Float[Array, "*of E"], ctx: Context) -> Float[Array, "*of E"]:
        return self.down_proj(self.act(self.up_proj(x, ctx)), ctx)


class PlainExperts(ExpertMatrices):
    """X experts, each `down(act(up(x)))`."""

    AXES = {"up_proj": ("experts", "mlp", "embed"), "down_proj": ("experts", "embed", "mlp")}  # noqa: RUF012
    INPUT_AXES = {"up_proj": -1, "down_proj": -1}  # noqa: RUF012

    def __init__(self, embed: int, mlp: int, experts: int, act: str):
        self.act = activation(act)
        for name, shape in (("up_proj", (experts, mlp, embed)), ("down_proj", (experts, embed, mlp))):
            setattr(self, name, param(shape, self.AXES[name], name, layouts=(Layout(f"{{}}.{name}.weight", (None,)),)))
        self.leave_room()

    def __call__(
        self, x: Float[Array, "B T E"], chosen: Int[Array, "B T k"], weights: Float[Array, "B T k"]
    ) -> Float[Array, "B T E"]:
        def feedforward(group: Group, params: dict[str, jax.Array]) -> jax.Array:
            return self.product(group, self.act(self.product(group, group.rows, params, "up_proj")), params, "down_proj")

        return self.routed(x, chosen, weights, feedforward)


class NemotronMoe(nnx.Module):
    """Routed experts, which may work in a latent space of fewer dimensions, beside one that every token uses."""

    def __init__(
        self, router: GroupRouter, experts: PlainExperts, shared: NemotronMLP, embed: int, latent: int | None, bias: bool
    ):
        self.gate, self.experts, self.shared_experts = router, experts, shared
        self.fc1_latent_proj = None if latent is None else Linear(embed, latent, ("embed", None), bias=bias)
        self.fc2_latent_proj = None if latent is None else Linear(latent, embed, (None, "embed"), bias=bias)

    def __call__(self, x: Float[Array, "B T E"], ctx: Context) -> Float[Array, "B T E"]:
        _, chosen, weights = self.gate(x)
        y = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x, ctx)
        y = self.experts(y, chosen, weights)
        y = y if self.fc2_latent_proj is None else self.fc2_latent_proj(y, ctx)
        return y + self.shared_experts(x, ctx)


class NemotronHBlock(nnx.Module):
    """One sublayer of any kind, under the same name."""

    def __init__(self, mixer: nnx.Module, embed: int, eps: float):
        self.mixer, self.norm = mixer, RMSNorm(embed, eps, round_first=False)
        mixes = isinstance(mixer, Mamba2 | LlamaAttention)  # tokens with each other
        self.attention_adapters = IdentityAdapter() if mixes else None
        self.output_adapters = None if mixes else IdentityAdapter()

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        if self.output_adapters is None:
            y, cache = self.mixer.attend(projected(self.norm, self.mixer, x, ctx), ctx, pattern, layer, cache)
            y = self.attention_adapters(x, y, ctx)
        else:
            y = self.output_adapters(x, self.mixer(self.norm(x), ctx), ctx)
        return constrain(x + y, "batch", "length", None), cache, jnp.float32(0)


class NemotronHModel(LlamaModel):
    """Llama's model without position embeddings, with other names for its embedding and its last norm."""

    def __init__(self, vocab: int, embed: int, eps: float, layers: Stack):
        super().__init__(vocab, embed, eps, layers, {})
        self.embeddings, self.norm_f = self.embed_tokens, RMSNorm(embed, eps, round_first=False)
        del self.embed_tokens, self.norm

    def embed(self, tokens: Tokens, dtype) -> Float[Array, "B T E"]:
        return self.embeddings(tokens, dtype)

    def last_norm(self, x: Float[Array, "*of E"]) -> Float[Array, "*of E"]:
        return self.norm_f(x)


class NemotronHForCausalLM(LlamaForCausalLM):
    def __init__(self, model: NemotronHModel, sizes: Sizes):
        super().__init__(model, sizes, tied=False)
        self.embedding = "model.embeddings"


def layer_types(facts: Facts) -> tuple[str, ...]:
    """Read the kind of each layer. Raises UserError for other kinds, or none."""
    types = tuple(facts["layers_block_type"] or ())
    if set(types) - TYPES.keys() or not types:
        raise UserError(
            f"config.json of this {facts.model_type} model has layers_block_type = {types}; expected one or more of "
            f"{', '.join(TYPES)}"
        )
    return tuple(TYPES[kind] for kind in types)


def mamba2(facts: Facts) -> Mamba2:
    """Build the Mamba-2 layer."""
    heads, head_dim, groups = facts["mamba_num_heads"], facts["mamba_head_dim"], facts["n_groups"]
    sizes = checked(facts, MambaSizes(heads, head_dim, groups, facts["ssm_state_size"], facts["conv_kernel"]))
    norm = GatedGroupNorm(sizes.channels[0], groups, facts["layer_norm_epsilon"])
    biases = {"bias": facts["use_bias"], "conv_bias": facts["use_conv_bias"]}
    limits = (float(facts["time_step_min"]), math.inf)
    layer = Mamba2(facts["hidden_size"], sizes, facts["mamba_hidden_act"], norm, **biases, limits=limits)
    layer.out_proj.adaptable = False  # PEFT refuses an adapter on it
    return layer


def moe(facts: Facts) -> NemotronMoe:
    """Build the layer of experts."""
    embed, act, bias, latent = facts["hidden_size"], facts["mlp_hidden_act"], facts["mlp_bias"], facts["moe_latent_size"]
    inside = embed if latent is None else latent
    experts = PlainExperts(inside, facts["moe_intermediate_size"], facts["n_routed_experts"], act)
    width = facts["moe_shared_expert_intermediate_size"] or facts["intermediate_size"]
    return NemotronMoe(corrected_router(facts), experts, NemotronMLP(embed, width, act, bias), embed, latent, bias)


def store_as_backbone(model: nnx.Module) -> None:
    """Give all parameters the names that they have in checkpoints."""
    for path, variable in variables(model):
        row = variable.row
        own = row.layouts or (Layout(row.name),)
        layouts = tuple(dataclasses.replace(layout, module=STORED) for layout in own)
        if path == "embeddings.weight":
            layouts = (*layouts, SINGULAR)
        variable.set_metadata("row", dataclasses.replace(row, layouts=layouts))


def build(facts: Facts) -> NemotronHForCausalLM:
    """Build the abstract model of a `nemotron_h` config.json."""
    embed, eps, types, head_dim = facts["hidden_size"], facts["layer_norm_epsilon"], layer_types(facts), facts["head_dim"]
    if facts["tie_word_embeddings"]:
        facts.only("tie_word_embeddings", False, why="transformers gives the model an output of its own in any case")
    # Of NVIDIA's code, of how a new model is initialised, or without effect on the numbers; transformers reads none of them
    # otherwise.
    facts.inert(
        "attention_bias", "chunk_size", "expand", "hidden_dropout", "mamba_proj_bias", "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap", "mtp_layers_block_type", "n_shared_experts", "num_logits_to_keep",
        "num_nextn_predict_layers", "output_router_logits", "rescale_prenorm_residual", "residual_in_fp32", "sliding_window",
        "time_step_floor", "time_step_limit", "time_step_max", "use_mamba_kernels",
    )  # fmt: skip
    # In published files, for a RoPE that their code does not have, and norms whose epsilon has another name in transformers.
    facts.inert("norm_eps", "partial_rotary_factor", "rope_parameters", "rope_theta")
    facts.only("attention_head_dim", head_dim, None, why="transformers reads head_dim")
    facts.carried.append("mtp.")  # layers that predict further tokens, which transformers ignores
    mlp = NemotronMLP(embed, facts["intermediate_size"], facts["mlp_hidden_act"], facts["mlp_bias"])
    mixers = {"mamba": mamba2(facts), "attention": attention(facts, bias=False), "mlp": mlp}
    if "moe" in types:
        mixers["moe"] = moe(facts)
    else:
        facts.inert(*OF_EXPERTS)
    blocks = {kind: NemotronHBlock(mixer, embed, eps) for kind, mixer in mixers.items()}
    stack = Stack(blocks, (Pattern(head_dim**-0.5),) * len(types), types)
    model = NemotronHModel(facts["vocab_size"], embed, eps, stack)
    store_as_backbone(model)
    heads, kv_heads = facts["num_attention_heads"], facts["num_key_value_heads"]
    sizes = Sizes(len(types), heads, kv_heads, head_dim, embed, facts["vocab_size"], positions=facts["max_position_embeddings"])
    return NemotronHForCausalLM(model, sizes)
