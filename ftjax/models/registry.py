"""Registry of model families by Hugging Face `model_type`."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftjax.errors import UserError
from ftjax.models.composite import Composite


@dataclass(frozen=True)
class Family:
    """A model family, built by `ftjax.models.<module>.build(facts)`."""

    module: str
    example: str  # a Hub id
    notes: str = ""
    prefix: str = "model"  # the first part of tensor names, missing in checkpoints without a head
    composite: Composite | None = None  # for a checkpoint in which this family is one part
    from_composite: str = ""  # the first part of names if transformers' text class saved what it had loaded from a composite
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # modules that transformers has as one in memory

    @property
    def build(self) -> Callable[..., Any]:
        return importlib.import_module(f"ftjax.models.{self.module}").build


# Files of the first composite models have the names of the text model and of the other parts at the top.
OUTSIDE = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
PROJECTED = ("model.vision_tower.", "model.multi_modal_projector.")

PARTS_OF_GEMMA4 = Composite(
    ("model.vision_tower.", "model.vision_embedder.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio."),
    (
        "vision_config", "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id", "boa_token_id",
        "eoa_token_id", "eoa_token_index", "audio_token_id", "vision_soft_tokens_per_image",
    ),
    clashing=True,
)  # fmt: skip

IMAGES_OF_QWEN = Composite(
    ("model.visual.",), ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
)

FAMILIES: dict[str, Family] = {
    "bamba": Family("bamba", "ibm-ai-platform/Bamba-9B-v2", "Bamba; Mamba-2, attention in a few layers"),
    "deepseek_v2": Family("deepseek_v2", "deepseek-ai/DeepSeek-V2-Lite-Chat", "DeepSeek V2; latent attention, routed experts"),
    "deepseek_v3": Family("deepseek_v3", "deepseek-ai/DeepSeek-V3", "DeepSeek V3, R1; latent attention, routed experts"),
    "falcon_h1": Family("falcon_h1", "tiiuae/Falcon-H1-1.5B-Instruct", "Falcon-H1; attention and Mamba-2 side by side"),
    "gemma": Family("gemma", "google/gemma-2b-it", "Gemma, CodeGemma"),
    "gemma2": Family("gemma2", "google/gemma-2-2b-it", "Gemma 2; local and global layers, bounded logits"),
    "gemma3": Family(
        "gemma3_text",
        "google/gemma-3-4b-it",
        "Gemma 3; the text is trained, image parts are kept",
        composite=Composite(
            PROJECTED,
            ("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image"),
            clashing=True,
            stored=OUTSIDE,
        ),
    ),
    "gemma3_text": Family("gemma3_text", "google/gemma-3-1b-it", "Gemma 3, text only: five local layers to one global"),
    "gemma4": Family(
        "gemma4_text",
        "google/gemma-4-E2B-it",
        "Gemma 4; the text is trained, parts for images and sound are kept",
        composite=PARTS_OF_GEMMA4,
    ),
    "gemma4_text": Family("gemma4_text", "google/gemma-4-E2B-it", "Gemma 4 without its parts for images and sound"),
    "gemma4_unified": Family(
        "gemma4_unified_text",
        "google/gemma-4-12B-it",
        "Gemma 4 12B; the text is trained, parts for images and sound are kept",
        composite=PARTS_OF_GEMMA4,
    ),
    "gemma4_unified_text": Family(
        "gemma4_unified_text", "google/gemma-4-12B-it", "Gemma 4 12B without its parts for images and sound"
    ),
    "glm4": Family("glm4", "zai-org/GLM-4-9B-0414", "GLM-4-0414, dense"),
    "glm4_moe": Family("glm4_moe", "zai-org/GLM-4.5-Air", "GLM-4.5, 4.6, 4.7; routed and shared experts"),
    "glm4_moe_lite": Family("glm4_moe_lite", "zai-org/GLM-4.7-Flash", "GLM-4.7-Flash; latent attention, routed experts"),
    "gpt2": Family("gpt2", "openai-community/gpt2", "GPT-2, DistilGPT-2, Cerebras-GPT", prefix="transformer"),
    "gpt_neox": Family("gpt_neox", "EleutherAI/pythia-160m", "Pythia, GPT-NeoX", prefix="gpt_neox"),
    "gpt_oss": Family("gpt_oss", "openai/gpt-oss-20b", "gpt-oss; routed experts, attention sinks, MXFP4 files"),
    "granite": Family("granite", "ibm-granite/granite-3.3-2b-instruct", "Granite 3, dense"),
    "granitemoe": Family("granitemoe", "ibm-granite/granite-3.1-3b-a800m-instruct", "Granite 3 with routed experts, PowerMoE"),
    "granitemoehybrid": Family(
        "granitemoehybrid", "ibm-granite/granite-4.0-h-tiny", "Granite 4; Mamba-2 and attention, with or without experts"
    ),
    "lfm2_moe": Family("lfm2_moe", "LiquidAI/LFM2-8B-A1B", "LFM2 with routed experts"),
    "lfm2": Family("lfm2", "LiquidAI/LFM2-1.2B", "LFM2; gated short convolutions between attention layers"),
    "llama4": Family(
        "llama4_text",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "Llama 4; chunked attention, routed experts; the text is trained, image parts are kept",
        prefix="language_model",
        composite=Composite(
            ("vision_model.", "multi_modal_projector."),
            ("vision_config", "boi_token_index", "eoi_token_index", "image_token_index"),
            whole=True,
            clashing=True,
        ),
    ),
    "llama4_text": Family("llama4_text", "meta-llama/Llama-4-Scout-17B-16E-Instruct", "Llama 4 without its parts for images"),
    "llama": Family("llama", "meta-llama/Llama-3.2-1B-Instruct", "Llama 2, 3, 3.1, 3.2, SmolLM, SmolLM2, TinyLlama"),
    "ministral": Family("ministral", "mistralai/Ministral-8B-Instruct-2410", "Ministral 8B; some layers see a window"),
    "mistral": Family("mistral", "mistralai/Mistral-7B-Instruct-v0.3", "Mistral 7B, Mistral Nemo, Mistral Small"),
    "ministral3": Family("ministral3", "mistralai/Ministral-3-3B-Instruct-2512", "Ministral 3; queries scaled by position"),
    "mistral3": Family(
        "ministral3",
        "mistralai/Ministral-3-3B-Instruct-2512",
        "Ministral 3, Mistral Small 3.1; the text is trained, image parts are kept",
        composite=Composite(
            PROJECTED,
            (
                "vision_config",
                "image_token_index",
                "multimodal_projector_bias",
                "projector_hidden_act",
                "spatial_merge_size",
                "vision_feature_layer",
            ),
            clashing=True,
            stored=OUTSIDE,
        ),
    ),
    "mixtral": Family("mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral; routed experts"),
    "nemotron_h": Family(
        "nemotron_h",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "Nemotron-H, Nemotron 3; Mamba-2, attention, MLPs and experts",
        prefix="backbone",
    ),
    "olmo2": Family("olmo2", "allenai/OLMo-2-0425-1B-Instruct", "OLMo 2"),
    "olmo3": Family("olmo3", "allenai/Olmo-3-7B-Instruct", "OLMo 3; three windowed layers to one global"),
    "olmo_hybrid": Family(
        "olmo_hybrid",
        "allenai/Olmo-Hybrid-7B",
        "OLMo Hybrid; linear attention",
        joined={"conv1d": ("q_conv1d", "k_conv1d", "v_conv1d")},
    ),
    "olmoe": Family("olmoe", "allenai/OLMoE-1B-7B-0924-Instruct", "OLMoE; routed experts"),
    "phi3": Family("phi3", "microsoft/Phi-4-mini-instruct", "Phi-3 and Phi-3.5 mini, Phi-4, Phi-4-mini"),
    "phimoe": Family("phimoe", "microsoft/Phi-3.5-MoE-instruct", "Phi-3.5-MoE; routed experts"),
    "qwen2": Family("qwen2", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen 2, Qwen 2.5, distillations of DeepSeek R1"),
    "qwen3": Family("qwen3", "Qwen/Qwen3-0.6B", "Qwen 3, dense"),
    "qwen3_5": Family(
        "qwen3_5_text",
        "Qwen/Qwen3.5-4B",
        "Qwen 3.5, dense; linear attention; the text is trained, image parts are kept",
        composite=IMAGES_OF_QWEN,
    ),
    "qwen3_5_text": Family(
        "qwen3_5_text", "Qwen/Qwen3.5-4B", "Qwen 3.5 without its parts for images", from_composite="model.language_model."
    ),
    "qwen3_5_moe": Family(
        "qwen3_5_moe_text",
        "Qwen/Qwen3.5-35B-A3B",
        "Qwen 3.5 with routed and shared experts; image parts are kept",
        composite=IMAGES_OF_QWEN,
    ),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text",
        "Qwen/Qwen3.5-35B-A3B",
        "Qwen 3.5 with experts, without its parts for images",
        from_composite="model.language_model.",
    ),
    "qwen3_moe": Family("qwen3_moe", "Qwen/Qwen3-30B-A3B", "Qwen 3 with routed experts"),
    "qwen3_vl": Family(
        "qwen3_vl_text",
        "Qwen/Qwen3-VL-4B-Instruct",
        "Qwen 3 VL; the text is trained, image parts are kept",
        composite=IMAGES_OF_QWEN,
    ),
    "qwen3_next": Family("qwen3_next", "Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen 3 Next; linear attention, experts"),
    "smollm3": Family("smollm3", "HuggingFaceTB/SmolLM3-3B", "SmolLM 3; layers without RoPE"),
}


def check_supported(model_type: str, where: str, text: Any = None) -> None:
    """Raise UserError, listing the families, if a model type is not one of them.

    Args:
        text: the `text_config` of a multimodal model.
    """
    if model_type in FAMILIES:
        return
    if text is not None:
        kind = text.get("model_type") if isinstance(text, Mapping) else None
        known = FAMILIES.get(kind)
        instead = f"take a text model, such as {known.example} ({kind})" if known else "take a text model of these families"
        raise UserError(
            f"{where}: model_type {model_type!r} wraps a text model ({kind}) with parts for images or sound, and ftjax knows "
            f"where that is in the files of other families only; {instead}. Supported are {', '.join(sorted(FAMILIES))}"
        )
    raise UserError(
        f"{where}: model_type {model_type!r} is not supported; supported families are {', '.join(sorted(FAMILIES))}"
    )
