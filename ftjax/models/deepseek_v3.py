"""DeepSeek V3: latent attention, groups of routed experts with a bias for balance, and experts that all tokens share.

Covers all models with `model_type: deepseek_v3`: DeepSeek V3 and R1, Moonlight. Source: DeepSeek-AI 2024 (arXiv:2412.19437).
"""

import math
from dataclasses import replace

from flax import nnx

from ftjax.errors import UserError
from ftjax.models.causal_lm import read_sizes
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM
from ftjax.models.mixtral import MoeBlock, MoeModel, dense_mlp, moe_stack
from ftjax.models.nn.experts import Experts, SparseMoe
from ftjax.models.nn.group_router import GroupRouter, Groups
from ftjax.models.nn.latent_attention import LatentAttention, LatentSizes
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.rope import apply, apply_interleaved, make_rope, refuse_partial

NAMES = ("gate_proj", "up_proj", "down_proj")  # of an expert's matrices in checkpoints


def latent_attention(facts: Facts, *, interleaved: bool = True) -> LatentAttention:
    """Build the attention. Raises UserError for key heads that are fewer than query heads, and for missing sizes."""
    heads = facts["num_attention_heads"]
    facts.dropout("attention_dropout")
    facts.only("num_key_value_heads", heads, why="each head has its own key and value, computed from the latent")
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    sizes = {name: facts[name] for name in names}
    if wrong := [f"{name} = {size!r}" for name, size in sizes.items() if not size or size < 1]:
        raise UserError(f"config.json of this {facts.model_type} model has {', '.join(wrong)}; give sizes of at least 1")
    sizes = LatentSizes(facts["q_lora_rank"], *sizes.values())
    rotate = apply_interleaved if interleaved else apply
    return LatentAttention(facts["hidden_size"], heads, sizes, facts["attention_bias"], rotate)


def scale_of(facts: Facts, head: int) -> float:
    """Return the factor on the scores: that of the head size, times the square of YaRN's `mscale_all_dim` factor."""
    rope = facts["rope_parameters"]
    weight = rope.get("mscale_all_dim") or 0
    if rope.get("rope_type", "default") == "default" or not weight:
        return head**-0.5
    if rope.get("factor") is None:
        raise UserError("rope_parameters: mscale_all_dim needs the factor of the scaling")
    factor = rope["factor"]
    return head**-0.5 * (1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0) ** 2


def groups(facts: Facts, judges: int) -> Groups | None:
    """Read the groups of experts; None if there is one. Raises UserError if a token cannot choose its experts from them."""
    experts, top_k = facts["n_routed_experts"], facts["num_experts_per_tok"]
    count, kept = facts["n_group"], facts["topk_group"]
    each = experts // count if count and experts % count == 0 else 0
    if each < judges or not kept or not 0 < kept <= count or not top_k or top_k > kept * each:
        raise UserError(
            f"config.json of this {facts.model_type} model has n_routed_experts = {experts}, n_group = {count!r}, "
            f"topk_group = {kept!r} and num_experts_per_tok = {top_k!r}; the groups must be of equal size, of at least "
            f"{judges} experts each, and those that are kept must have the experts of a token"
        )
    return None if count == kept else Groups(count, kept, judges)


def sparse_mlp(facts: Facts, router: GroupRouter, *, bias: bool = False) -> SparseMoe:
    """Build a layer of routed experts, and shared ones in a single feed-forward layer."""
    embed, act, small = facts["hidden_size"], facts["hidden_act"], facts["moe_intermediate_size"]
    shared = dense_mlp(embed, small * facts["n_shared_experts"], act, bias)
    return SparseMoe(router, Experts(embed, small, facts["n_routed_experts"], act, NAMES, None), shared=shared)


def corrected_router(facts: Facts) -> GroupRouter:
    """Build the router with sigmoid scores and a correction bias."""
    top_k, normalise, scale = facts["num_experts_per_tok"], facts["norm_topk_prob"], facts["routed_scaling_factor"]
    return GroupRouter(
        facts["hidden_size"], facts["n_routed_experts"], top_k, scores="sigmoid", groups=groups(facts, 2),
        normalise=bool(normalise), scale=float(scale), corrected=True,
    )  # fmt: skip


def carry_extra_layers(facts: Facts) -> None:
    """Keep the layers that predict further tokens (`num_nextn_predict_layers`) for exports; transformers ignores them."""
    layers, more = facts["num_hidden_layers"], facts.get("num_nextn_predict_layers", 0)
    facts.carried += [f"model.layers.{layer}." for layer in range(layers, layers + more)]


def first_dense(facts: Facts) -> tuple[bool, ...]:
    """Return for each layer whether it has experts: all but the first `first_k_dense_replace`."""
    layers, dense = facts["num_hidden_layers"], facts["first_k_dense_replace"]
    if dense is None or dense < 0:
        raise UserError(
            f"config.json of this {facts.model_type} model has first_k_dense_replace = {dense!r}; give the number of layers "
            "without experts"
        )
    return tuple(layer >= dense for layer in range(layers))


def latent_decoder(
    facts: Facts, router: GroupRouter | None, sparse: tuple[bool, ...], *, interleaved: bool = True, bias: bool = False
) -> LlamaForCausalLM:
    """Build a model with latent attention; `sparse` says which layers have experts, and `bias` is that of their MLPs."""
    embed, eps, vocab = facts["hidden_size"], facts["rms_norm_eps"], facts["vocab_size"]
    dense, act, experts = facts["intermediate_size"], facts["hidden_act"], facts["n_routed_experts"]
    facts.inert("qk_head_dim", "output_router_logits", "pretraining_tp")  # computed, or without effect on the loss
    rope = refuse_partial(facts["rope_parameters"])

    def block(routed: bool) -> nnx.Module:
        mlp = sparse_mlp(facts, router, bias=bias) if routed else dense_mlp(embed, dense, act, bias)
        return MoeBlock(latent_attention(facts, interleaved=interleaved), mlp, embed, eps, experts)

    heads = facts["qk_nope_head_dim"] + facts["qk_rope_head_dim"]
    stack = moe_stack(block, (Pattern(scale_of(facts, heads)),) * len(sparse), sparse)
    rope = make_rope(rope, facts["qk_rope_head_dim"], facts["max_position_embeddings"])
    model = MoeModel(vocab, embed, eps, stack, rope, 0.0, sum(sparse))
    return LlamaForCausalLM(model, replace(read_sizes(facts), head_dim=heads), facts["tie_word_embeddings"])


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `deepseek_v3` config.json."""
    facts.only("head_dim", facts["qk_rope_head_dim"], why="transformers reads it as the size of the rotated part")
    facts.only("scoring_func", "sigmoid", why="the router of DeepSeek V3 has sigmoid scores")
    facts.only("topk_method", "noaux_tc", why="the router of DeepSeek V3 chooses groups with a correction bias")
    facts.only("moe_layer_freq", 1, why="transformers gives all layers after the first dense ones experts")
    facts.inert("ep_size", "seq_aux", "aux_loss_alpha")  # DeepSeek's training, which transformers does not read
    carry_extra_layers(facts)
    return latent_decoder(facts, corrected_router(facts), first_dense(facts), interleaved=bool(facts["rope_interleave"]))
