"""Qwen 3.5, text only: three layers of gated DeltaNet to one of gated attention.

Source: transformers, models/qwen3_5/modeling_qwen3_5.py (`Qwen3_5ForCausalLM`). Its rotary embedding has sections for the time,
height and width of an image (MRoPE); the three positions of a text are equal, so that sections make no difference here.

Legend: B batch, T query length, E embed, N heads, H head dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ftjax.errors import UserError
from ftjax.mesh import constrain
from ftjax.models.causal_lm import read_sizes
from ftjax.models.facts import Facts
from ftjax.models.gemma import gemma_norm
from ftjax.models.llama import LlamaAttention, LlamaForCausalLM, LlamaModel, attention, mlp
from ftjax.models.nn.cache import Memories
from ftjax.models.nn.context import Context
from ftjax.models.nn.gated_delta_net import DeltaSizes, GatedDeltaNet, Projected
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.layers import IdentityAdapter, Linear
from ftjax.models.nn.remat import projected
from ftjax.models.nn.rope import Rope, make_rope
from ftjax.models.nn.stack import Stack

MTP = "mtp."  # layers that predict further tokens, which transformers ignores too


class GatedAttention(LlamaAttention):
    """Attention whose output is multiplied by the sigmoid of a gate; `q_proj` has a query and a gate for each head."""

    def __init__(self, embed: int, heads: int, kv_heads: int, head_dim: int, bias: bool, **options):
        super().__init__(embed, heads, kv_heads, head_dim, bias, **options)
        self.q_proj = Linear(embed, 2 * heads * head_dim, ("embed", "heads"), bias=bias)

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> tuple[Float[Array, "B T *_"], ...]:
        """Project `x [B, T, E]` to queries, keys and values as in Llama, and the gate `[B, T, N H]`."""
        b, t, _ = x.shape
        q, gate = jnp.split(self.q_proj(x, ctx).reshape(b, t, self.heads, -1), 2, axis=-1)
        k = self.k_proj(x, ctx).reshape(b, t, self.kv_heads, self.head_dim)
        v = self.v_proj(x, ctx).reshape(b, t, self.kv_heads, self.head_dim)
        return self.q_norm(q), self.k_norm(k), v, gate.reshape(b, t, -1)

    def attend(self, found: tuple[jax.Array, ...], ctx: Context, pattern: Pattern, layer, cache: Memories):
        """Map the result of `project` to `([B, T, E], cache)`."""
        *qkv, gate = found
        y, cache = self.mixed(tuple(qkv), ctx, pattern, layer, cache)
        return self.o_proj(y * jax.nn.sigmoid(gate), ctx), cache


class Qwen3_5DeltaNet(GatedDeltaNet):
    """A gated DeltaNet with one projection for queries, keys and values."""

    def __init__(self, embed: int, sizes: DeltaSizes, act: str, eps: float):
        super().__init__(embed, sizes, act, eps)
        self.in_proj_qkv = Linear(embed, sum(sizes.channels), ("embed", "heads"))
        self.in_proj_z = Linear(embed, sizes.channels[2], ("embed", "heads"))
        self.in_proj_b = Linear(embed, sizes.value_heads, ("embed", "heads"))
        self.in_proj_a = Linear(embed, sizes.value_heads, ("embed", "heads"))

    def project(self, x: Float[Array, "B T E"], ctx: Context) -> Projected:
        gate = self.in_proj_z(x, ctx).reshape(*x.shape[:2], self.sizes.value_heads, -1)
        return Projected(*self.by_heads(self.in_proj_qkv(x, ctx)), gate, self.in_proj_a(x, ctx), self.in_proj_b(x, ctx))


class Qwen3_5Block(nnx.Module):
    """Llama's block around either kind of mixer, each under its own name; some or all blocks of a model may have experts."""

    def __init__(self, mixer: GatedAttention | GatedDeltaNet, mlp: nnx.Module, embed: int, eps: float, experts: int = 0):
        self.experts = experts  # of the model, whether or not this block has some
        self.self_attn = mixer if isinstance(mixer, GatedAttention) else None
        self.linear_attn = mixer if isinstance(mixer, GatedDeltaNet) else None
        self.mlp = mlp
        self.input_layernorm, self.post_attention_layernorm = gemma_norm(embed, eps), gemma_norm(embed, eps)
        self.attention_adapters, self.output_adapters = IdentityAdapter(), IdentityAdapter()

    def __call__(self, x: jax.Array, ctx: Context, pattern: Pattern, layer, cache: Memories):
        mixer = self.self_attn or self.linear_attn
        y, cache = mixer.attend(projected(self.input_layernorm, mixer, x, ctx), ctx, pattern, layer, cache)
        x = constrain(x + self.attention_adapters(x, y, ctx), "batch", "length", None)
        y, aux = self.mlp(self.post_attention_layernorm(x), ctx), jnp.float32(0)
        if isinstance(y, tuple):
            y, aux = y
        elif self.experts:
            aux = {"chosen": jnp.zeros(self.experts), "probability": jnp.zeros(self.experts)}
        x = x + self.output_adapters(x, y, ctx)
        return constrain(x, "batch", "length", None), cache, aux


def delta_sizes(facts: Facts) -> DeltaSizes:
    """Read the sizes of the gated DeltaNet. Raises UserError if its key heads do not divide its value heads."""
    keys, values = facts["linear_num_key_heads"], facts["linear_num_value_heads"]
    if values % keys:
        raise UserError(
            f"config.json of this {facts.model_type} model has linear_num_value_heads = {values}, which is not a multiple of "
            f"linear_num_key_heads = {keys}"
        )
    return DeltaSizes(
        keys, values, facts["linear_key_head_dim"], facts["linear_value_head_dim"], facts["linear_conv_kernel_dim"]
    )


def layer_types(facts: Facts) -> tuple[str, ...]:
    """Read the kind of each layer. Raises UserError for other kinds."""
    facts.inert("full_attention_interval")  # transformers has computed `layer_types` from it
    types = tuple(facts["layer_types"])
    other = sorted(set(types) - {"full_attention", "linear_attention"})
    if other or len(types) != facts["num_hidden_layers"]:
        raise UserError(
            f"config.json of this {facts.model_type} model has layer_types {', '.join(types)} for {facts['num_hidden_layers']} "
            "layers; expected full_attention or linear_attention for each"
        )
    return types


def stack_of(
    facts: Facts, net: type[GatedDeltaNet], mlp: Callable[[bool], nnx.Module], sparse: tuple[bool, ...] = (), experts: int = 0
) -> Stack:
    """Build the layers, each with attention or a gated DeltaNet of this class.

    Args:
        mlp: returns a new feed-forward layer, with experts or without.
        sparse: whether each layer has experts; none by default.
        experts: number of experts.
    """
    embed, eps, head_dim, act = facts["hidden_size"], facts["rms_norm_eps"], facts["head_dim"], facts["hidden_act"]
    types, sizes = layer_types(facts), delta_sizes(facts)
    choice = tuple(zip(types, sparse or (False,) * len(types), strict=True))

    def mixer(kind: str) -> GatedAttention | GatedDeltaNet:
        if kind == "linear_attention":
            return net(embed, sizes, act, eps)
        norms = {"q_norm": gemma_norm(head_dim, eps), "k_norm": gemma_norm(head_dim, eps)}
        return attention(facts, bias=facts["attention_bias"], kind=GatedAttention, **norms)

    def name(kind: str, has_experts: bool) -> str:
        return f"{kind}_{'sparse' if has_experts else 'dense'}"

    kinds = [(kind, here) for kind in ("linear_attention", "full_attention") for here in (False, True)]
    blocks = {
        name(*kind): Qwen3_5Block(mixer(kind[0]), mlp(kind[1]), embed, eps, experts) for kind in kinds if experts or not kind[1]
    }
    return Stack(blocks, (Pattern(head_dim**-0.5),) * len(types), tuple(name(*kind) for kind in choice))


def text_rope(facts: Facts, head_dim: int) -> Rope:
    """Build the RoPE of a text. Raises UserError for sections that transformers could not read."""
    sections = facts["rope_parameters"].get("mrope_section")
    if sections is not None and len(sections) != 3:
        raise UserError(f"rope_parameters: mrope_section needs three numbers (time, height and width), found {sections!r}")
    return make_rope(facts["rope_parameters"], head_dim, facts["max_position_embeddings"])


def published(facts: Facts) -> None:
    """Read fields of published files that transformers does not know: they say what it does in any case, and how others compute
    the state and the layers that predict further tokens."""
    facts.only("attn_output_gate", True, None, why="attention without its gate has other weights")
    facts.only("output_gate_type", "swish", "silu", None, why="transformers knows no other gate")
    facts.inert(
        "mamba_ssm_dtype", "mtp_num_hidden_layers", "unsloth_fixed_mtp", "mtp_use_dedicated_embeddings", "partial_rotary_factor"
    )
    facts.carried.append(MTP)


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `qwen3_5_text` config.json."""
    published(facts)
    facts.only("mlp_only_layers", [], None, why="this model has no experts")
    stack, rope = stack_of(facts, Qwen3_5DeltaNet, lambda _: mlp(facts)), text_rope(facts, facts["head_dim"])
    model = LlamaModel(facts["vocab_size"], facts["hidden_size"], facts["rms_norm_eps"], stack, rope, gemma_norm)
    return LlamaForCausalLM(model, read_sizes(facts), facts["tie_word_embeddings"])
