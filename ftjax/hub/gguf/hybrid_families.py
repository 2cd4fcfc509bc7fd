"""The families of hybrid models that llama.cpp has: Mamba-2, short convolutions or experts in some layers, attention in others.

A file says of which kind a layer is by what it has none of: `attention.head_count_kv` is 0 where there is no attention.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, ExpertGatingFuncType

from ftjax.hub.gguf.family import (
    ALL_ROPES,
    BIASES,
    LLAMA,
    MLP,
    NO_BIAS,
    NO_MLP_BIAS,
    RMS,
    ROTATED,
    TIED,
    Computed,
    Config,
    Family,
    Only,
    Taken,
    silu,
)  # fmt: skip
from ftjax.hub.gguf.layout import Change, Folded, RateColumn, Scaled, Squeezed
from ftjax.models.lfm2 import hidden_size

KV, FEED_FORWARD = "attention.head_count_kv", "feed_forward_length"
PER_LAYER = {key: name for key, name in LLAMA.items() if key != KV}

# Mamba-2: sizes under Bamba's names, and what llama.cpp takes for granted.
SSM = {
    "ssm.conv_kernel": "mamba_d_conv", "ssm.state_size": "mamba_d_state", "ssm.time_step_rank": "mamba_n_heads",
    "ssm.group_count": "mamba_n_groups",
}  # fmt: skip
NO_LIMITS = Only("time_step_limit", ([0.0, math.inf], (0.0, math.inf)))
PLAIN_MAMBA = (Only("mamba_conv_bias", (True,)), Only("mamba_proj_bias", (False,)), NO_LIMITS)
STEP = {r"\.dt_bias$": ".dt_proj.bias"}


def mamba_changes(groups: str) -> dict[str, Callable[[Config], Change]]:
    """Return the changes of Mamba-2's tensors; `groups` is the field with the number of groups."""
    return {
        r"\.A_log": lambda _: RateColumn(), r"\.D": lambda _: Folded(), r"\.conv1d\.weight": lambda _: Squeezed(),
        r"\.(mamba|mixer)\.norm\.weight": lambda config: Folded(config[groups]),
    }  # fmt: skip


def _inner_size(settings: Taken, config: Config) -> dict[str, Any]:
    inner = settings.take("ssm.inner_size")
    return {"mamba_d_head": inner // config["mamba_n_heads"]}


INNER_SIZE = Computed(lambda c: {"ssm.inner_size": c["mamba_n_heads"] * c["mamba_d_head"]}, _inner_size)


def kv_heads(kinds: Callable[[Config], list[bool]], fields: Callable[[list[bool]], Mapping[str, Any]]) -> Computed:
    """Return the setting that is 0 in layers without attention.

    Args:
        kinds: whether each layer has attention.
        fields: the fields of config.json that say so.
    """

    def read(settings: Taken, config: Config) -> dict[str, Any]:
        each = settings.take_each(KV, config["num_hidden_layers"])
        return {"num_key_value_heads": max(each), **fields([count > 0 for count in each])}

    return Computed(lambda c: {KV: [c["num_key_value_heads"] * here for here in kinds(c)]}, read)


def _by_type(attention: str, other: str) -> Computed:
    return kv_heads(
        lambda c: [kind == attention for kind in c["layer_types"]],
        lambda has: {"layer_types": [attention if here else other for here in has]},
    )


BAMBA_LAYERS = kv_heads(
    lambda c: [layer in (c["attn_layer_indices"] or ()) for layer in range(c["num_hidden_layers"])],
    lambda has: {"attn_layer_indices": [layer for layer, here in enumerate(has) if here]},
)
# llama.cpp takes this key, which says something else elsewhere, for whether there is a RoPE.
ROPE_SWITCH = "rope.scaling.finetuned"
ALWAYS_ROPE = Computed(lambda _: {ROPE_SWITCH: True}, lambda settings, _: {})


def _position(settings: Taken, _: Config) -> dict[str, Any]:
    return {"position_embedding_type": "rope" if settings.take(ROPE_SWITCH, True) else "nope"}


MAYBE_ROPE = Computed(lambda c: {ROPE_SWITCH: c["position_embedding_type"] == "rope"}, _position)

GRANITE = {
    "logit_scale": "logits_scaling", "residual_scale": "residual_multiplier", "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
}  # fmt: skip
GRANITE_EXPERTS = {
    "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
    "expert_shared_feed_forward_length": "shared_intermediate_size",
}  # fmt: skip
# The MLP that all tokens share is the only one where there are no experts.
OF_DENSE = {r"\.shared_mlp\.output_linear\.": ".mlp.down_proj."}
HALVES_OF_DENSE = {r"\.shared_mlp\.input_linear\.": (".mlp.gate_proj.", ".mlp.up_proj.")}
HALVES_OF_EXPERTS = {
    r"\.block_sparse_moe\.input_linear\.": (".mlp.experts.gate_proj.", ".mlp.experts.up_proj."),
    r"\.shared_mlp\.input_linear\.": (".mlp.shared_experts.gate_proj.", ".mlp.shared_experts.up_proj."),
}
DENSE_WIDTH = {FEED_FORWARD: "shared_intermediate_size"}
NO_EXPERTS = Computed(lambda _: {}, lambda settings, _: {"num_local_experts": 0})
TWICE_AS_WIDE = Only("mamba_expand", (2,))
HYBRID_CHANGES = ROTATED | mamba_changes("mamba_n_groups")
HYBRID_LAYERS = _by_type("full_attention", "linear_attention")


def _all_attention(config: Config) -> bool:
    return set(config["layer_types"]) == {"full_attention"}


def _dense(config: Config) -> bool:
    return not config["num_local_experts"]


WITH_ROPE = (silu(), Only("position_embedding_type", ("rope",)))
BIAS_OF_ATTENTION = {"attention_bias": BIASES["attention_bias"]}
GRANITE_HYBRID = Family(
    MODEL_ARCH.GRANITE_HYBRID, PER_LAYER | GRANITE | GRANITE_EXPERTS | SSM, only=(silu(), TWICE_AS_WIDE, *PLAIN_MAMBA),
    biases=BIAS_OF_ATTENTION, changes=HYBRID_CHANGES, computed=(INNER_SIZE, HYBRID_LAYERS, MAYBE_ROPE), ropes=ALL_ROPES,
    renamed=STEP, halves=HALVES_OF_EXPERTS, told_by=lambda settings: "logit_scale" in settings,
    variants=(
        Family(
            MODEL_ARCH.GRANITE, LLAMA | GRANITE | DENSE_WIDTH, only=WITH_ROPE, biases=BIAS_OF_ATTENTION, changes=ROTATED,
            ropes=ALL_ROPES, renamed=OF_DENSE, halves=HALVES_OF_DENSE, told_by=lambda _: False,
            of=lambda c: _all_attention(c) and _dense(c),
        ),
        Family(
            MODEL_ARCH.GRANITE_MOE, LLAMA | GRANITE | GRANITE_EXPERTS, only=WITH_ROPE, biases=BIAS_OF_ATTENTION,
            changes=ROTATED, ropes=ALL_ROPES, halves=HALVES_OF_EXPERTS,
            computed=(Computed(lambda _: {}, lambda _, c: {"layer_types": ["full_attention"] * c["num_hidden_layers"]}),),
            told_by=lambda settings: bool(settings.get("expert_shared_feed_forward_length")), of=_all_attention,
        ),
        Family(
            MODEL_ARCH.GRANITE_HYBRID, PER_LAYER | GRANITE | DENSE_WIDTH | SSM, only=(silu(), TWICE_AS_WIDE, *PLAIN_MAMBA),
            biases=BIAS_OF_ATTENTION, changes=HYBRID_CHANGES, computed=(INNER_SIZE, HYBRID_LAYERS, MAYBE_ROPE, NO_EXPERTS),
            ropes=ALL_ROPES, renamed=STEP | OF_DENSE, halves=HALVES_OF_DENSE, of=_dense,
            told_by=lambda settings: "logit_scale" in settings and not settings.get("expert_count"),
        ),
    ),
)  # fmt: skip
BAMBA = Family(
    MODEL_ARCH.GRANITE_HYBRID, PER_LAYER | SSM, only=(silu(), TWICE_AS_WIDE, *PLAIN_MAMBA), biases=BIASES,
    changes=HYBRID_CHANGES, computed=(INNER_SIZE, BAMBA_LAYERS, ALWAYS_ROPE), ropes=ALL_ROPES, renamed=STEP, partial_rope=True,
    told_by=lambda settings: "logit_scale" not in settings,
)  # fmt: skip


def _in_projection(config: Config) -> Scaled:
    inner, state = config["mamba_n_heads"] * config["mamba_d_head"], config["mamba_n_groups"] * config["mamba_d_state"]
    parts = (inner, inner, state, state, config["mamba_n_heads"])
    return Scaled(np.repeat(np.asarray(config["ssm_multipliers"], np.float32), parts) * config["ssm_in_multiplier"])


def _times(*names: str) -> Callable[[Config], Scaled]:
    return lambda config: Scaled(math.prod(config[name] for name in names))


def _falcon_fields(settings: Taken, config: Config) -> dict[str, Any]:
    inner = settings.take("ssm.inner_size")
    return {
        "mamba_d_ssm": inner, "mamba_d_head": inner // config["mamba_n_heads"],
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in settings.tensors,
        # The weights of a file have been multiplied already.
        "mlp_multipliers": [1.0, 1.0], "ssm_multipliers": [1.0] * 5, **{
            f"{name}_multiplier": 1.0
            for name in ("key", "attention_in", "attention_out", "ssm_in", "ssm_out", "lm_head", "embedding")
        },
    }  # fmt: skip


FALCON_H1 = Family(
    MODEL_ARCH.FALCON_H1, LLAMA | SSM,
    only=(
        silu(), NO_BIAS, Only("projectors_bias", (False,)), *PLAIN_MAMBA,
        Only("mamba_norm_before_gate", lambda c: (False,) if c["mamba_rms_norm"] else (True, False)),
    ),
    biases={"mlp_bias": MLP},
    changes={
        r"\.q_proj\.weight": _times("attention_in_multiplier"), r"\.v_proj\.weight": _times("attention_in_multiplier"),
        r"\.k_proj\.weight": _times("attention_in_multiplier", "key_multiplier"),
        r"\.o_proj\.weight": _times("attention_out_multiplier"), r"\.out_proj\.weight": _times("ssm_out_multiplier"),
        r"\.in_proj\.weight": _in_projection, r"embed_tokens\.weight": _times("embedding_multiplier"),
        r"lm_head\.weight": _times("lm_head_multiplier"),
        r"\.gate_proj\.(weight|bias)": lambda c: Scaled(c["mlp_multipliers"][0]),
        r"\.down_proj\.(weight|bias)": lambda c: Scaled(c["mlp_multipliers"][1]),
        **mamba_changes("mamba_n_groups"),
    },
    computed=(Computed(lambda c: {"ssm.inner_size": c["mamba_n_heads"] * c["mamba_d_head"]}, _falcon_fields),),
    renamed=STEP, copied_output=lambda c: c["embedding_multiplier"] != c["lm_head_multiplier"],
)  # fmt: skip

# LFM2: gated short convolutions.
CONVOLUTIONS = _by_type("full_attention", "conv")
LFM2_KEYS = {key: name for key, name in PER_LAYER.items() if key not in RMS} | {
    "attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache",
}  # fmt: skip
LFM2_CHANGES = {r"\.conv\.conv\.weight": lambda _: Squeezed()}
NO_CONV_BIAS = Only("conv_bias", (False,))
LFM2_WIDTH = Computed(
    lambda c: {FEED_FORWARD: hidden_size(c)},  # type: ignore[arg-type]
    lambda settings, _: {"intermediate_size": settings.take(FEED_FORWARD), "block_auto_adjust_ff_dim": False},
)
SIGMOID = Computed(
    lambda _: {"expert_gating_func": int(ExpertGatingFuncType.SIGMOID)},
    lambda settings, _: settings.take("expert_gating_func") and {},
)
LFM2 = Family(
    MODEL_ARCH.LFM2, {key: name for key, name in LFM2_KEYS.items() if key != FEED_FORWARD}, only=(NO_CONV_BIAS,),
    changes=LFM2_CHANGES, computed=(CONVOLUTIONS, LFM2_WIDTH), fixed_heads=True,
)  # fmt: skip
LFM2_MOE = Family(
    MODEL_ARCH.LFM2MOE,
    LFM2_KEYS | {
        "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size", "leading_dense_block_count": "num_dense_layers",
    },
    only=(
        NO_CONV_BIAS, TIED, Only("use_expert_bias", (True,)), Only("norm_topk_prob", (True,)),
        Only("routed_scaling_factor", (1.0,)),
    ),
    changes=LFM2_CHANGES, computed=(CONVOLUTIONS, SIGMOID), fixed_heads=True,
    renamed={r"\.expert_bias$": ".expert_bias.bias", r"model\.(layers\.\d+\.feed_forward\.experts)": r"\1"},
)  # fmt: skip

# Nemotron-H: every layer is of one kind.
MAMBA, ATTENTION, EXPERTS, DENSE = "linear_attention", "full_attention", "moe", "mlp"
NEMOTRON_KEYS = {
    "embedding_length": "hidden_size", "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon", "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "ssm_state_size", "ssm.time_step_rank": "mamba_num_heads", "ssm.group_count": "n_groups",
}  # fmt: skip
NEMOTRON_ONLY = (
    silu("mamba_hidden_act"), Only("mlp_hidden_act", ("relu2",)), NO_MLP_BIAS, Only("use_bias", (False,)),
    Only("use_conv_bias", (True,)),
)  # fmt: skip
NEMOTRON_RENAMED = STEP | {
    r"\.e_score_correction_bias$": ".e_score_correction.bias",
    r"^backbone\.(layers\.\d+\.)mixer(\.experts\.)": r"model.\1mlp\2",
}


def _step_limit(config: Config) -> str | None:
    least = config["time_step_min"]
    return (
        f"llama.cpp has no smallest step of Mamba-2; this model's is {least}, so answers may differ a little" if least else None
    )


def nemotron_layers(feed_forward: str, width: str) -> Computed:
    """Return the settings that say of which kind each layer is, and how wide.

    Args:
        feed_forward: the kind of layers that are not of Mamba-2 or attention.
        width: the field with their width.
    """

    def keys(config: Config) -> dict[str, Any]:
        types, eps = config["layers_block_type"], config["layer_norm_epsilon"]
        return {
            "attention.layer_norm_epsilon": float(eps),  # llama.cpp asks for it, and uses the other
            "block_count": len(types), "ssm.inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
            KV: [config["num_key_value_heads"] * (kind == ATTENTION) for kind in types],
            FEED_FORWARD: [config[width] * (kind == feed_forward) for kind in types],
        }  # fmt: skip

    def fields(settings: Taken, config: Config) -> dict[str, Any]:
        layers = settings.take("block_count")
        heads, widths = settings.take_each(KV, layers), settings.take_each(FEED_FORWARD, layers)
        types = [feed_forward if w else ATTENTION if h else MAMBA for h, w in zip(heads, widths, strict=True)]
        inner = settings.take("ssm.inner_size")
        return {
            "layers_block_type": types, "num_key_value_heads": max(heads), width: max(widths),
            "mamba_head_dim": inner // config["mamba_num_heads"],
        }  # fmt: skip

    return Computed(keys, fields)


def _expert_keys(config: Config) -> dict[str, Any]:
    groups = {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    return {
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"] or config["intermediate_size"],
        "expert_shared_count": 1, "moe_latent_size": config["moe_latent_size"], **(groups if config["n_group"] > 1 else {}),
    }  # fmt: skip


def _expert_fields(settings: Taken, config: Config) -> dict[str, Any]:
    settings.take("expert_shared_count", None)
    groups = settings.take("expert_group_count", 1) or 1
    return {
        "moe_shared_expert_intermediate_size": settings.take("expert_shared_feed_forward_length"),
        "moe_latent_size": settings.take("moe_latent_size", None), "n_group": groups,
        "topk_group": settings.take("expert_group_used_count", groups) or groups,
    }  # fmt: skip


NEMOTRON_H = Family(
    MODEL_ARCH.NEMOTRON_H, NEMOTRON_KEYS, only=NEMOTRON_ONLY, changes=mamba_changes("n_groups"),
    computed=(nemotron_layers(DENSE, "intermediate_size"),), renamed=NEMOTRON_RENAMED, ropes=(), remark=_step_limit,
    variants=(
        Family(
            MODEL_ARCH.NEMOTRON_H_MOE,
            NEMOTRON_KEYS | {
                "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok",
                "expert_feed_forward_length": "moe_intermediate_size", "expert_weights_norm": "norm_topk_prob",
                "expert_weights_scale": "routed_scaling_factor",
            },
            only=(*NEMOTRON_ONLY, Only("layers_block_type", lambda c: ([k for k in c["layers_block_type"] if k != DENSE],))),
            changes=mamba_changes("n_groups"),
            computed=(nemotron_layers(EXPERTS, "moe_intermediate_size"), Computed(_expert_keys, _expert_fields)),
            renamed=NEMOTRON_RENAMED, ropes=(), remark=_step_limit, of=lambda c: EXPERTS in c["layers_block_type"],
        ),
    ),
)  # fmt: skip

HYBRIDS: dict[str, Family] = {
    "bamba": BAMBA, "granitemoehybrid": GRANITE_HYBRID, "nemotron_h": NEMOTRON_H, "falcon_h1": FALCON_H1, "lfm2": LFM2,
    "lfm2_moe": LFM2_MOE,
}  # fmt: skip
