"""What a family of models is in config.json and in a GGUF file, for reading and writing.

Names of tensors come from the `gguf` package (`TensorNameMap`); a `Family` says what it does not know: keys for fields of
config.json, how tensors are changed, and what llama.cpp takes for granted (its `src/models/<architecture>.cpp`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from ftjax.hub.gguf.layout import Change, Plus, interleaved_rows

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


class Taken(Protocol):
    """The settings of a file, each to be taken once (`ftjax.hub.gguf.taken.Settings`)."""

    left: dict[str, Any]
    tensors: Mapping[str, Any]

    def take(self, key: str, *default: Any) -> Any: ...

    def take_each(self, key: str, layers: int) -> list[Any]: ...


@dataclass(frozen=True)
class Computed:
    """Settings that are not fields of config.json one by one, such as those that differ from layer to layer.

    Attributes:
        keys: returns them for a file.
        fields: takes them from a file, and returns the fields of config.json that they stand for; its second argument has the
            fields that were read before.
    """

    keys: Callable[[Config], Mapping[str, Any]]
    fields: Callable[[Taken, Config], Mapping[str, Any]]


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
        computed: further settings.
        halves: for ends of Hugging Face names, the two ends in whose place they stand: gate and up projection in one tensor.
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
        told_by: whether a file of this architecture, with these settings, is of this family, where several have it.
        variants: other architectures as which some models of this type are written.
        of: which models are, for a variant.
        remark: returns what llama.cpp computes a little differently, for the user.
    """

    arch: MODEL_ARCH
    keys: Mapping[str, str] = field(default_factory=lambda: LLAMA)
    only: tuple[Only, ...] = (silu(), NO_BIAS)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    changes: Mapping[str, Callable[[Config], Change]] = field(default_factory=dict)
    computed: tuple[Computed, ...] = ()
    halves: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rope: bool = False
    local_rope: bool = False
    one_theta: bool = False
    rounded_yarn: bool = False
    windows: int | None = None
    always_windows: bool = False
    fixed_heads: bool = False
    copied_output: bool | Callable[[Config], bool] = False
    told_by: Callable[[Mapping[str, Any]], bool] = lambda _: True
    variants: tuple["Family", ...] = ()
    of: Callable[[Config], bool] = lambda _: True
    remark: Callable[[Config], str | None] = lambda _: None

    @property
    def architecture(self) -> str:
        return MODEL_ARCH_NAMES[self.arch]


def _rotated(heads: str) -> Callable[[Config], Change]:
    def change(config: Config) -> Change:
        part = (config.get("rope_parameters") or {}).get("partial_rotary_factor") or 1.0
        return interleaved_rows(config.get(heads) or config["num_attention_heads"], part)

    return change


# llama.cpp rotates neighbouring dimensions of these.
ROTATED = {
    r"\.q_proj\.(weight|bias)": _rotated("num_attention_heads"),
    r"\.k_proj\.(weight|bias)": _rotated("num_key_value_heads"),
}
ALL_ROPES = ("default", "linear", "yarn", "llama3", "longrope")
ONE_PLUS = {r"norm\.weight": lambda _: Plus(1.0)}
BIASES = {"attention_bias": ATTENTION, "mlp_bias": MLP}
