"""The families that llama.cpp has, and the tensors of their files.

Those whose layers are of several kinds are in `ftjax.hub.gguf.hybrid_families`.
"""

import re
from collections.abc import Iterable

from gguf import MODEL_ARCH, get_tensor_name_map

from ftjax.errors import UserError
from ftjax.hub.gguf.family import (
    ALL_ROPES,
    ATTENTION,
    BIASES,
    EVERY_FOURTH,
    EXPERTS,
    LLAMA,
    NO_BIAS,
    NO_MLP_BIAS,
    ONE_PLUS,
    ROTATED,
    SIZES,
    SOFTCAP,
    TIED,
    Computed,
    Config,
    Family,
    Only,
    gelu,
    score_scalar,
    silu,
)
from ftjax.hub.gguf.hybrid_families import GRANITE, HALVES_OF_EXPERTS, HYBRIDS, SIGMOID
from ftjax.hub.gguf.layout import Experts, Halves, Interleaved, One, Part, Same, Transposed, grouped_rows
from ftjax.hub.gguf.linear_families import LINEAR_FAMILIES, MROPE
from ftjax.models.composite import text_of

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
SUFFIXES = (".weight", ".bias")


QUERY_NORMS = Computed(lambda _: {}, lambda settings, _: {"use_qk_norm": "blk.0.attn_q_norm.weight" in settings.tensors})
# The norm of all keys is as wide as that of all queries.
ONE_TO_ONE = Only("num_key_value_heads", lambda c: (c["num_attention_heads"],))


def never(settings: object) -> bool:
    """Of a family whose files are read as another, or that files only are of."""
    return False


FAMILIES: dict[str, Family] = {
    "llama": Family(
        MODEL_ARCH.LLAMA, only=(silu(),), biases=BIASES, changes=ROTATED, ropes=ALL_ROPES,
        told_by=lambda settings: not settings.get("expert_count"),
    ),
    "mistral": Family(MODEL_ARCH.LLAMA, only=(silu(),), changes=ROTATED, ropes=ALL_ROPES, told_by=never),
    "ministral": Family(MODEL_ARCH.LLAMA, only=(silu(),), changes=ROTATED, ropes=ALL_ROPES, told_by=never),
    "mixtral": Family(
        MODEL_ARCH.LLAMA, LLAMA | EXPERTS, only=(silu(),), changes=ROTATED, ropes=ALL_ROPES,
        renamed={r"model\.(layers\.\d+)\.block_sparse_moe\.experts": r"\1.feed_forward.experts"},
    ),
    "qwen2": Family(MODEL_ARCH.QWEN2, only=(silu(),), fixed_heads=True),
    "qwen3": Family(MODEL_ARCH.QWEN3, variants=(Family(MODEL_ARCH.QWEN3VL, computed=(MROPE,), of=never),)),
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
    "olmo2": Family(
        MODEL_ARCH.OLMO2, fixed_heads=True, copied_output=True,
        told_by=lambda settings: not settings.get("attention.sliding_window"),
    ),
    "olmo3": Family(MODEL_ARCH.OLMO2, local_rope=True, one_theta=True, windows=4, fixed_heads=True, copied_output=True),
    "granite": Family(
        MODEL_ARCH.GRANITE, LLAMA | GRANITE, only=(silu(),), biases=BIASES, changes=ROTATED, ropes=ALL_ROPES,
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
    "granitemoe": Family(
        MODEL_ARCH.GRANITE_MOE, LLAMA | GRANITE | EXPERTS, only=(silu(),), biases={"attention_bias": ATTENTION},
        changes=ROTATED, ropes=ALL_ROPES, halves={key: both for key, both in HALVES_OF_EXPERTS.items() if "sparse" in key},
        told_by=lambda settings: not settings.get("expert_shared_feed_forward_length"),
    ),
    "olmoe": Family(
        MODEL_ARCH.OLMOE, LLAMA | {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        only=(silu(), NO_BIAS, Only("norm_topk_prob", (False,)), Only("clip_qkv", (None,)), ONE_TO_ONE),
        fixed_heads=True, copied_output=True,
    ),
    "glm4": Family(MODEL_ARCH.GLM4, only=(silu(),), biases={"attention_bias": ATTENTION[:3]}, partial_rope=True),
    "glm4_moe": Family(
        MODEL_ARCH.GLM4_MOE,
        LLAMA | {
            "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size", "leading_dense_block_count": "first_k_dense_replace",
            "expert_shared_count": "n_shared_experts", "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
        },
        only=(silu(), Only("n_group", (1,)), Only("topk_group", (1,))),
        biases={"attention_bias": ATTENTION[:3]}, partial_rope=True, computed=(SIGMOID, QUERY_NORMS),
        renamed={r"\.e_score_correction_bias$": ".e_score_correction.bias"},
    ),
} | HYBRIDS | LINEAR_FAMILIES  # fmt: skip

# Families that llama.cpp cannot load, or not as they are.
REFUSED = {"olmo_hybrid": "llama.cpp has no such architecture"}
INSTEAD = "Export a folder (--merge) instead, for transformers or vLLM"


def family_of(config: Config) -> Family:
    """Return the family of a model, by its config.json. Raises UserError if ftjax does not write it as GGUF."""
    model_type = text_of(config)["model_type"]
    if model_type in REFUSED:
        raise UserError(f"model_type {model_type!r} cannot be written as GGUF: {REFUSED[model_type]}. {INSTEAD}")
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} cannot be written as GGUF; ftjax writes {', '.join(sorted(FAMILIES))}. {INSTEAD}"
        )
    family = FAMILIES[model_type]
    return next((variant for variant in family.variants if variant.of(text_of(config))), family)


def families_as(architecture: str) -> list[tuple[str, Family]]:
    """Return model types and families whose files are of this architecture."""
    every = [(name, one) for name, family in FAMILIES.items() for one in (*family.variants, family)]
    return [(name, family) for name, family in every if family.architecture == architecture]


def architectures() -> list[str]:
    return sorted({one.architecture for family in FAMILIES.values() for one in (family, *family.variants)})


def copies_output(family: Family, config: Config) -> bool:
    """Return whether the file of a model with a tied output has it twice all the same."""
    return family.copied_output(config) if callable(family.copied_output) else family.copied_output


def parts(family: Family, config: Config, layers: int, names: Iterable[str]) -> list[Part]:
    """Return how these tensors of a checkpoint are stored, each in one part.

    Raises UserError for a tensor that the architecture does not have.
    """
    known = get_tensor_name_map(family.arch, layers)

    def find(name: str, whole: str) -> str:
        """Return the name in the file of a tensor, which is a part of a `whole` in the checkpoint."""
        name = name.replace("model.language_model.", "model.", 1)  # where a text model is inside another
        for pattern, instead in family.renamed.items():
            name = re.sub(pattern, instead, name)
        stored = known.get_name(name, SUFFIXES)
        if stored is None:
            raise UserError(f"{whole} cannot be written as GGUF: llama.cpp's {family.architecture!r} has no such tensor")
        return stored

    found: list[Part] = []
    experts: dict[str, dict[int, str]] = {}
    for name in names:
        halves = next(((end, both) for end, both in family.halves.items() if re.search(end, name)), None)
        if match := EXPERT.fullmatch(name):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = name
        elif halves is not None:
            end, both = halves
            found.append(Halves(name, *(find(re.sub(end, one, name), name) for one in both)))
        elif ".experts.gate_up_proj" in name:
            gate, up = (find(name.replace("gate_up_proj", f"{one}_proj"), name) for one in ("gate", "up"))
            found.append(Interleaved(name, gate, up, name.endswith("_bias")))
        else:
            change = next((make(config) for end, make in family.changes.items() if re.search(f"{end}$", name)), Same())
            found.append(One(name, find(name, name), change))
    for name, each in experts.items():
        found.append(Experts([each[number] for number in range(len(each))], find(name, each[0])))
    return found
