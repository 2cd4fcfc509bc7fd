"""Phi-3.5-MoE: Mixtral's experts behind a router that compares each choice with its rivals only (Abdin et al. 2024,
arXiv:2404.14219; Liu et al. 2024, "GRIN", arXiv:2409.12136).

Source: transformers, models/phimoe/modeling_phimoe.py.

Legend: B batch, T length, E embed, V vocab, X experts, k experts per token.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from ftjax.errors import UserError
from ftjax.models.causal_lm import head_size, read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM, attention
from ftjax.models.mixtral import STORED, MoeBlock, MoeModel, router_loss
from ftjax.models.nn.experts import Experts, Router, SparseMoe
from ftjax.models.nn.layer_types import Pattern, window
from ftjax.models.nn.layers import LayerNorm, Linear, project
from ftjax.models.nn.param import Layout
from ftjax.models.nn.rope import Rope, make_rope, refuse_partial
from ftjax.models.nn.stack import Stack

CHOSEN = 2  # experts of a token: the router's code has two choices, one after the other


class SparseMixer(Router):
    """Chooses the best expert, then the best of the others; a weight is the softmax over the choice and those close to it.

    An expert is close if its score is at most `2 * jitter` below the best one, relative to the larger of the best score and the
    magnitude of its own. In training, transformers draws the experts among those that are close; here they are the best ones,
    as in its evaluation. The gradient is that of the softmax in both.
    """

    def __init__(self, embed: int, experts: int, jitter: float):
        layout = Layout("weight", module=("mlp.router", "block_sparse_moe.gate"))
        super().__init__(embed, experts, CHOSEN, normalise=False, layout=layout)
        self.jitter = jitter

    def __call__(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float32[Array, "B T X"], Int[Array, "B T k"], Float32[Array, "B T k"]]:
        """Return the logits, the chosen experts of each token, and their weights."""
        logits = project(x, self.weight[...]).astype(jnp.float32)
        first, weight = self.choice(logits, logits)
        others = jnp.where(jax.nn.one_hot(first, logits.shape[-1], dtype=bool), -jnp.inf, logits)
        second, other_weight = self.choice(others, logits)
        return logits, jnp.stack([first, second], axis=-1), jnp.stack([weight, other_weight], axis=-1)

    def choice(
        self, open_to: Float32[Array, "B T X"], logits: Float32[Array, "B T X"]
    ) -> tuple[Int[Array, "B T"], Float32[Array, "B T"]]:
        """Return the best expert among those that are `open_to` choice, the others being at -inf, and its weight."""
        best = jax.lax.stop_gradient(jnp.max(open_to, axis=-1, keepdims=True))
        own = jax.lax.stop_gradient(logits)
        far = (best - own) / jnp.maximum(jnp.abs(own), best) > 2 * self.jitter
        close = jax.nn.softmax(jnp.where(far, -jnp.inf, open_to), axis=-1)
        chosen = jnp.argmax(open_to, axis=-1)
        return chosen, jnp.take_along_axis(close, chosen[..., None], axis=-1)[..., 0]


class PhimoeBlock(MoeBlock):
    """Mixtral's block with layer normalisation."""

    def __init__(self, attention, mlp: SparseMoe, embed: int, eps: float, experts: int):
        super().__init__(attention, mlp, embed, eps, experts)
        self.input_layernorm, self.post_attention_layernorm = LayerNorm(embed, eps), LayerNorm(embed, eps)


def rope_of(facts: Facts) -> Rope:
    """Build the RoPE: with scaling, only the factor on cos and sin depends on the length of a text, as in transformers."""
    parameters, head_dim = refuse_partial(facts["rope_parameters"]), head_size(facts)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return make_rope(parameters, head_dim, facts["max_position_embeddings"])
    if kind != "longrope":
        raise UserError(
            f"rope_parameters: rope_type {kind!r} of this phimoe model is not supported; supported are default, longrope"
        )
    facts.read_in_rope |= {"short_mscale", "long_mscale"}
    rope = make_rope(parameters, head_dim, facts["max_position_embeddings"])
    short, long = float(parameters["short_mscale"]), float(parameters["long_mscale"])
    return replace(rope, scaling=short, long_scaling=long, long_inv_freq=rope.inv_freq)


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `phimoe` config.json."""
    embed, layers, eps = facts["hidden_size"], facts["num_hidden_layers"], facts["rms_norm_eps"]
    vocab, experts, tied = facts["vocab_size"], facts["num_local_experts"], facts["tie_word_embeddings"]
    jitter, noise = float(facts["router_jitter_noise"]), facts["input_jitter_noise"]
    if facts["num_experts_per_tok"] != CHOSEN:
        facts.only("num_experts_per_tok", CHOSEN, why="the router chooses two experts")
    with_bias = facts["lm_head_bias"]
    if with_bias and tied:
        raise UserError("config.json of this phimoe model has tie_word_embeddings and lm_head_bias; a tied output has no bias")
    if jitter or noise:
        facts.note(
            f"config.json of this phimoe model has router_jitter_noise = {jitter} and input_jitter_noise = {noise}: in "
            "training, transformers draws the experts of a token among the best ones, and adds noise to the router's and the "
            "experts' inputs; ftjax does neither, as in transformers' evaluation"
        )
    routed = Experts(embed, facts["intermediate_size"], experts, facts["hidden_act"], ("w1", "w3", "w2"), STORED)
    mlp = SparseMoe(SparseMixer(embed, experts, jitter), routed, name="router")
    block = PhimoeBlock(attention(facts, bias=facts["attention_bias"]), mlp, embed, eps, experts)
    stack = Stack(block, (Pattern(head_size(facts) ** -0.5, window(facts)),) * layers)
    model = MoeModel(vocab, embed, eps, stack, rope_of(facts), router_loss(facts), layers)
    model.norm = LayerNorm(embed, eps)
    root = LlamaForCausalLM(model, read_sizes(facts), tied)
    if with_bias:
        root.lm_head = Linear(embed, vocab, ("embed", "vocab"), bias=True)
    return root
