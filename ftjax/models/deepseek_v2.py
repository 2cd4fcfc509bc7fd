"""DeepSeek V2: latent attention, experts chosen by softmax scores, and experts that all tokens share.

Covers all models with `model_type: deepseek_v2`: DeepSeek V2, V2.5, V2-Lite and Coder V2. Source: DeepSeek-AI 2024
(arXiv:2405.04434).
"""

from ftjax.errors import UserError
from ftjax.models.deepseek_v3 import first_dense, groups, latent_decoder
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM
from ftjax.models.nn.group_router import GroupRouter


def softmax_router(facts: Facts) -> GroupRouter:
    """Build the router. Raises UserError for fields that transformers reads differently from DeepSeek's own code."""
    experts, top_k, method = facts["n_routed_experts"], facts["num_experts_per_tok"], facts["topk_method"]
    facts.only("topk_method", "greedy", "group_limited_greedy", why="these are the choices of DeepSeek V2")
    if facts["norm_topk_prob"]:
        facts.only("norm_topk_prob", False, None, why="transformers does not normalise the weights of the chosen experts")
    facts.only("scoring_func", "softmax", why="the router of DeepSeek V2 has softmax scores")
    if not top_k or top_k > experts:
        raise UserError(
            f"config.json of this deepseek_v2 model has num_experts_per_tok = {top_k!r}; give the number of experts of a "
            f"token, of {experts}"
        )
    facts.inert("n_group", "topk_group")  # if all experts are one group
    return GroupRouter(
        facts["hidden_size"], experts, top_k, scores="softmax", normalise=False, scale=float(facts["routed_scaling_factor"]),
        groups=groups(facts, 1) if method == "group_limited_greedy" else None, corrected=False,
    )  # fmt: skip


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `deepseek_v2` config.json."""
    facts.only("head_dim", facts["qk_rope_head_dim"], why="transformers reads it as the size of the rotated part")
    facts.only("moe_layer_freq", 1, why="transformers gives all layers after the first dense ones experts")
    facts.inert("ep_size", "seq_aux", "aux_loss_alpha")  # DeepSeek's training, which transformers does not read
    return latent_decoder(facts, softmax_router(facts), first_dense(facts), bias=facts["mlp_bias"])
