"""The families that llama.cpp has: what is what in config.json and in a GGUF file, for reading and writing.

Names of tensors come from the `gguf` package (`TensorNameMap`); what is here is what it does not know: keys for fields of
config.json, how tensors are changed, and what llama.cpp takes for granted (its `src/models/<architecture>.cpp`).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from ftjax.errors import UserError
from ftjax.hub.gguf.layout import (
    Change,
    Experts,
    Interleaved,
    One,
    Part,
    Plus,
    Same,
    Transposed,
    grouped_rows,
    interleaved_rows,
)

Config = Mapping[str, Any]

# GGUF key, without the architecture's name -> field of config.json
SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
LLAMA = SIZES | RMS
EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
SOFTCAP = {"final_logit_softcapping": "final_logit_softcapping"}

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Only:
    """A field of config.json that llama.cpp takes for granted.

    Attributes:
        name: the field.
        values: the values that are as llama.cpp computes, or a function of the other fields that returns them; the first is
            what a GGUF file stands for.
    """

    name: str
    values: tuple[Any, ...] | Callable[[Config], tuple[Any, ...]]

    def allowed(self, config: Config) -> tuple[Any, ...]:
        return self.values(config) if callable(self.values) else self.values


def silu(name: str = "hidden_act") -> Only:
    return Only(name, ("silu", "swish"))


def gelu(name: str, first: str = "gelu_pytorch_tanh") -> Only:
    # llama.cpp computes every GELU by its approximation with tanh, from a table in float16.
    return Only(name, tuple(dict.fromkeys((first, "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu"))))


def score_scalar(wide: int) -> Only:
    """Gemma's scores are scaled by a head's size; in its largest model, of `wide` layers, by hidden_size / heads."""

    def values(config: Config) -> tuple[int]:
        heads = config["num_attention_heads"]
        return (config["hidden_size"] // heads if config["num_hidden_layers"] == wide else config["head_dim"],)

    return Only("query_pre_attn_scalar", values)


NO_BIAS, NO_MLP_BIAS, TIED = Only("attention_bias", (False,)), Only("mlp_bias", (False,)), Only("tie_word_embeddings", (True,))
EVERY_FOURTH = Only("no_rope_layers", lambda c: ([int((layer + 1) % 4 != 0) for layer in range(c["num_hidden_layers"])],))
ATTENTION, MLP = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
        arch: llama.cpp's architecture.
        keys: GGUF keys and the fields of config.json that they hold; fields that are None are left out.
        only: fields that llama.cpp takes for granted.
        defaults: llama.cpp's values where a file lacks a key, so that None cannot be written.
        biases: fields that say whether modules, all or none, have a bias.
        changes: for ends of Hugging Face names (a regular expression), the change that a tensor undergoes.
        renamed: parts of Hugging Face names that the `gguf` package knows under another name.
        ropes: types of RoPE that llama.cpp computes for this architecture.
        partial_rope: whether a part of each head may rotate.
        local_rope: whether layers with windows have a RoPE of their own.
        one_theta: whether llama.cpp uses one `rope_theta` for both all the same.
        rounded_yarn: YaRN's bounds may be rounded though config.json says not to.
        windows: if llama.cpp has sliding windows for this architecture: every n-th layer is without one where a file does not
            say which.
        always_windows: whether a file without windows would get some.
        fixed_heads: whether a head's size is always hidden_size / num_attention_heads.
        copied_output: llama.cpp wants an output matrix, so that a tied one is written twice.
    """

    arch: MODEL_ARCH
    keys: Mapping[str, str] = field(default_factory=lambda: LLAMA)
    only: tuple[Only, ...] = (silu(), NO_BIAS)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    changes: Mapping[str, Callable[[Config], Change]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rope: bool = False
    local_rope: bool = False
    one_theta: bool = False
    rounded_yarn: bool = False
    windows: int | None = None
    always_windows: bool = False
    fixed_heads: bool = False
    copied_output: bool = False

    @property
    def architecture(self) -> str:
        return MODEL_ARCH_NAMES[self.arch]


def _rotated(heads: str) -> Callable[[Config], Change]:
    return lambda config: interleaved_rows(config.get(heads) or config["num_attention_heads"])


# llama.cpp rotates neighbouring dimensions of these.
ROTATED = {
    r"\.q_proj\.(weight|bias)": _rotated("num_attention_heads"),
    r"\.k_proj\.(weight|bias)": _rotated("num_key_value_heads"),
}
ALL_ROPES = ("default", "linear", "yarn", "llama3", "longrope")
ONE_PLUS = {r"norm\.weight": lambda _: Plus(1.0)}
BIASES = {"attention_bias": ATTENTION, "mlp_bias": MLP}

FAMILIES: dict[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, only=(silu(),), biases=BIASES, changes=ROTATED, ropes=ALL_ROPES),
    "mistral": Family(MODEL_ARCH.LLAMA, only=(silu(),), changes=ROTATED, ropes=ALL_ROPES),
    "ministral": Family(MODEL_ARCH.LLAMA, only=(silu(),), changes=ROTATED, ropes=ALL_ROPES),
    "mixtral": Family(
        MODEL_ARCH.LLAMA, LLAMA | EXPERTS, only=(silu(),), changes=ROTATED, ropes=ALL_ROPES,
        renamed={r"model\.(layers\.\d+)\.block_sparse_moe\.experts": r"\1.feed_forward.experts"},
    ),
    "qwen2": Family(MODEL_ARCH.QWEN2, only=(silu(),), fixed_heads=True),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "qwen3_moe": Family(
        MODEL_ARCH.QWEN3MOE, LLAMA | EXPERTS | {"expert_feed_forward_length": "moe_intermediate_size"},
        only=(
            silu(), NO_BIAS, Only("norm_topk_prob", (True,)), Only("mlp_only_layers", ([], None)),
            Only("decoder_sparse_step", (1,)),
        ),
    ),
    "gemma": Family(MODEL_ARCH.GEMMA, only=(gelu("hidden_act"), NO_BIAS, TIED), changes=ONE_PLUS),
    "gemma2": Family(
        MODEL_ARCH.GEMMA2, LLAMA | SOFTCAP | {"attn_logit_softcapping": "attn_logit_softcapping"},
        only=(gelu("hidden_activation"), NO_BIAS, TIED, score_scalar(46)),
        defaults={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096},
        changes=ONE_PLUS, windows=2, always_windows=True,
    ),
    "gemma3_text": Family(
        MODEL_ARCH.GEMMA3, LLAMA | SOFTCAP, only=(gelu("hidden_activation"), NO_BIAS, score_scalar(62)),
        defaults={"rope.freq_base_swa": 10000.0}, changes=ONE_PLUS, ropes=("default", "linear"), local_rope=True, windows=6,
    ),
    "phi3": Family(
        MODEL_ARCH.PHI3, only=(silu(),), ropes=("default", "linear", "longrope"), partial_rope=True, fixed_heads=True
    ),
    "smollm3": Family(MODEL_ARCH.SMOLLM3, only=(silu(), NO_BIAS, NO_MLP_BIAS, EVERY_FOURTH), changes=ROTATED),
    "olmo2": Family(MODEL_ARCH.OLMO2, fixed_heads=True, copied_output=True),
    "olmo3": Family(MODEL_ARCH.OLMO2, local_rope=True, one_theta=True, windows=4, fixed_heads=True, copied_output=True),
    "granite": Family(
        MODEL_ARCH.GRANITE,
        LLAMA | {
            "logit_scale": "logits_scaling", "residual_scale": "residual_multiplier",
            "embedding_scale": "embedding_multiplier", "attention.scale": "attention_multiplier",
        },
        only=(silu(),), biases=BIASES, changes=ROTATED, ropes=ALL_ROPES,
    ),
    "gpt_oss": Family(
        MODEL_ARCH.GPT_OSS, LLAMA | EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
        only=(Only("attention_bias", (True,)), Only("swiglu_alpha", (1.702,)), Only("swiglu_limit", (7.0,))),
        changes={r"\.experts\.down_proj": lambda _: Transposed()},
        renamed={
            r"\.sinks$": ".sinks.weight", r"(\.experts\.\w+_proj)_bias$": r"\1.bias", r"(\.experts\.\w+_proj)$": r"\1.weight",
        },
        rounded_yarn=True, windows=2, always_windows=True, copied_output=True,
    ),
    "gpt2": Family(
        MODEL_ARCH.GPT2,
        {
            "block_count": "n_layer", "embedding_length": "n_embd", "feed_forward_length": "n_inner",
            "attention.head_count": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        only=(
            gelu("activation_function", "gelu_new"), Only("scale_attn_weights", (True,)),
            Only("scale_attn_by_inverse_layer_idx", (False,)),
        ),
        changes={r"\.(c_attn|c_proj|c_fc)\.weight": lambda _: Transposed()}, ropes=(), fixed_heads=True,
    ),
    "gpt_neox": Family(
        MODEL_ARCH.GPTNEOX,
        {
            **{key: name for key, name in SIZES.items() if key != "attention.head_count_kv"},
            "attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual",
        },
        only=(gelu("hidden_act", "gelu"), Only("attention_bias", (True,))),
        changes={r"\.query_key_value\.(weight|bias)": lambda c: grouped_rows(c["num_attention_heads"])},
        partial_rope=True, fixed_heads=True, copied_output=True,
    ),
}  # fmt: skip


def family_of(model_type: str) -> Family:
    """Return a model type's family. Raises UserError if ftjax does not write it as GGUF."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} cannot be written as GGUF; ftjax writes {', '.join(sorted(FAMILIES))}. Export a folder "
            "(--merge) instead"
        )
    return FAMILIES[model_type]


def parts(family: Family, config: Config, layers: int, names: Iterable[str]) -> list[Part]:
    """Return how these tensors of a checkpoint are stored, each in one part.

    Raises UserError for a tensor that the architecture does not have.
    """
    known = get_tensor_name_map(family.arch, layers)

    def find(name: str) -> str | None:
        for pattern, instead in family.renamed.items():
            name = re.sub(pattern, instead, name)
        return known.get_name(name, SUFFIXES)

    found: list[Part] = []
    experts: dict[str, dict[int, str]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = name
        elif ".experts.gate_up_proj" in name:
            gate, up = (find(name.replace("gate_up_proj", f"{one}_proj")) for one in ("gate", "up"))
            found.append(Interleaved(name, _known(gate, name, family), _known(up, name, family), name.endswith("_bias")))
        else:
            change = next((make(config) for end, make in family.changes.items() if re.search(f"{end}$", name)), Same())
            found.append(One(name, _known(find(name), name, family), change))
    for name, each in experts.items():
        found.append(Experts([each[number] for number in range(len(each))], _known(find(name), name, family)))
    return found


def _known(stored: str | None, name: str, family: Family) -> str:
    if stored is None:
        raise UserError(f"{name} cannot be written as GGUF: llama.cpp's {family.architecture!r} has no such tensor")
    return stored
