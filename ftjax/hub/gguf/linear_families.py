"""The families with gated DeltaNets that llama.cpp has, and Qwen's text models from inside checkpoints with images."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf import MODEL_ARCH

from ftjax.hub.gguf.family import LLAMA, NO_BIAS, Computed, Config, Family, Only, Taken, silu
from ftjax.hub.gguf.layout import Change, Plus, Rate, Reordered, ReorderedColumns, Same, Squeezed

SECTIONS = "rope.dimension_sections"
RECURRENT, INTERVAL = "attention.recurrent_layers", "full_attention_interval"
FULL, LINEAR = "full_attention", "linear_attention"


def _sections(config: Config) -> dict[str, Any]:
    # How many pairs of dimensions rotate with time, height and width; all three are one position in a text.
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    pairs = int(head * (config["rope_parameters"].get("partial_rotary_factor") or 1.0)) // 2
    return {SECTIONS: [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]}


MROPE = Computed(_sections, lambda settings, _: settings.take_each(SECTIONS, 3) and {})


def _layer_keys(config: Config) -> dict[str, Any]:
    types = config["layer_types"]
    linear = [kind == LINEAR for kind in types]
    interval = next((n for n in range(1, len(types) + 1) if linear == [(at + 1) % n != 0 for at in range(len(types))]), None)
    inner = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    # The interval is for older versions of llama.cpp, which do not know the other key.
    return {RECURRENT: linear, "ssm.inner_size": inner, **({} if interval is None else {INTERVAL: interval})}


def _layer_fields(settings: Taken, config: Config) -> dict[str, Any]:
    layers, interval = config["num_hidden_layers"], settings.take(INTERVAL, 4)
    linear = [(at + 1) % interval != 0 for at in range(layers)]
    if RECURRENT in settings.left:
        linear = settings.take_each(RECURRENT, layers)
    size = settings.take("ssm.inner_size") // config["linear_num_value_heads"]
    return {"layer_types": [LINEAR if here else FULL for here in linear], "linear_value_head_dim": size}


DELTA_KEYS = LLAMA | {
    "ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads",
}  # fmt: skip
DELTA_LAYERS = Computed(_layer_keys, _layer_fields)
# llama.cpp normalises queries and keys of a gated DeltaNet with the epsilon of the norms; transformers always takes 1e-6.
DELTA_ONLY = (
    silu(), NO_BIAS, Only("linear_value_head_dim", lambda c: (c["linear_key_head_dim"],)), Only("rms_norm_eps", (1e-6,)),
)  # fmt: skip
SHARED = {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}  # fmt: skip
NORMS = {r"(?<!linear_attn\.)norm\.weight": lambda _: Plus(1.0)}
STEP = {r"\.dt_bias$": ".dt_proj.bias"}


def value_heads(before: Callable[[Config], int], size: Callable[[Config], int]) -> Callable[[Config], Callable]:
    """Return the order in which llama.cpp has the value heads: the first of each key head, then the second of each.

    Args:
        before: rows before those of the value heads, which stay.
        size: rows of a value head.
    """

    def of(config: Config) -> Callable[[int], np.ndarray]:
        keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]

        def order(count: int) -> np.ndarray:
            place = np.arange(count)
            own = place[before(config) :].reshape(values // keys, keys, size(config))
            return np.concatenate([place[: before(config)], own.swapaxes(0, 1).reshape(-1)])

        return order

    return of


def _none(_: Config) -> int:
    return 0


def _one(_: Config) -> int:
    return 1


def _queries_and_keys(config: Config) -> int:
    return 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]


def _value_size(config: Config) -> int:
    return config["linear_value_head_dim"]


def _rows(before: Callable, size: Callable, then: Change | None = None) -> Callable[[Config], Change]:
    order = value_heads(before, size)
    return lambda config: Reordered(order(config), then or Same())


BY_VALUE_HEADS: Mapping[str, Callable[[Config], Change]] = {
    r"\.in_proj_qkv\.weight": _rows(_queries_and_keys, _value_size),
    r"\.conv1d\.weight": _rows(_queries_and_keys, _value_size, Squeezed()),
    r"\.in_proj_z\.weight": _rows(_none, _value_size),
    r"\.in_proj_[ab]\.weight": _rows(_none, _one),
    r"\.dt_bias": _rows(_none, _one),
    r"\.A_log": _rows(_none, _one, Rate()),
    r"\.linear_attn\.out_proj\.weight": lambda config: ReorderedColumns(value_heads(_none, _value_size)(config)),
}
QWEN3_5 = {"changes": NORMS | BY_VALUE_HEADS, "computed": (DELTA_LAYERS, MROPE), "renamed": STEP, "partial_rope": True}
WITHOUT_WIDTH = {key: name for key, name in DELTA_KEYS.items() if key != "feed_forward_length"}

LINEAR_FAMILIES: dict[str, Family] = {
    "qwen3_5_text": Family(MODEL_ARCH.QWEN35, DELTA_KEYS, only=DELTA_ONLY, **QWEN3_5),
    "qwen3_5_moe_text": Family(MODEL_ARCH.QWEN35MOE, WITHOUT_WIDTH | SHARED, only=DELTA_ONLY, **QWEN3_5),
    "qwen3_next": Family(
        MODEL_ARCH.QWEN3NEXT, DELTA_KEYS | SHARED,
        only=(
            *DELTA_ONLY, Only("norm_topk_prob", (True,)), Only("mlp_only_layers", ([], None)),
            Only("decoder_sparse_step", (1,)),
        ),
        changes=NORMS | {r"\.conv1d\.weight": lambda _: Squeezed(), r"\.A_log": lambda _: Rate()}, computed=(DELTA_LAYERS,),
        renamed=STEP, partial_rope=True,
    ),
    "qwen3_vl_text": Family(MODEL_ARCH.QWEN3VL, computed=(MROPE,), told_by=lambda _: False),  # read as Qwen 3
}  # fmt: skip
