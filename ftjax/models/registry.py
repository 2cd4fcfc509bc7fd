"""Registry of model families by Hugging Face `model_type`."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ftjax.errors import UserError


@dataclass(frozen=True)
class Family:
    """A model family, built by `ftjax.models.<module>.build(facts)`."""

    module: str
    example: str  # a Hub id
    notes: str = ""
    prefix: str = "model"  # the first part of tensor names, missing in checkpoints without a head

    @property
    def build(self) -> Callable[..., Any]:
        return importlib.import_module(f"ftjax.models.{self.module}").build


FAMILIES: dict[str, Family] = {
    "gemma": Family("gemma", "google/gemma-2b-it", "Gemma, CodeGemma"),
    "gemma2": Family("gemma2", "google/gemma-2-2b-it", "Gemma 2; local and global layers, bounded logits"),
    "gemma3_text": Family("gemma3_text", "google/gemma-3-1b-it", "Gemma 3, text only: five local layers to one global"),
    "gpt2": Family("gpt2", "openai-community/gpt2", "GPT-2, DistilGPT-2, Cerebras-GPT", prefix="transformer"),
    "gpt_neox": Family("gpt_neox", "EleutherAI/pythia-160m", "Pythia, GPT-NeoX", prefix="gpt_neox"),
    "gpt_oss": Family("gpt_oss", "openai/gpt-oss-20b", "gpt-oss; routed experts, attention sinks, MXFP4 files"),
    "granite": Family("granite", "ibm-granite/granite-3.3-2b-instruct", "Granite 3, dense"),
    "llama": Family("llama", "meta-llama/Llama-3.2-1B-Instruct", "Llama 2, 3, 3.1, 3.2, SmolLM, SmolLM2, TinyLlama"),
    "ministral": Family("ministral", "mistralai/Ministral-8B-Instruct-2410", "Ministral 8B; some layers see a window"),
    "mistral": Family("mistral", "mistralai/Mistral-7B-Instruct-v0.3", "Mistral 7B, Mistral Nemo, Mistral Small"),
    "mixtral": Family("mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral; routed experts"),
    "olmo2": Family("olmo2", "allenai/OLMo-2-0425-1B-Instruct", "OLMo 2"),
    "olmo3": Family("olmo3", "allenai/Olmo-3-7B-Instruct", "OLMo 3; three windowed layers to one global"),
    "phi3": Family("phi3", "microsoft/Phi-4-mini-instruct", "Phi-3 and Phi-3.5 mini, Phi-4, Phi-4-mini"),
    "qwen2": Family("qwen2", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen 2, Qwen 2.5, distillations of DeepSeek R1"),
    "qwen3": Family("qwen3", "Qwen/Qwen3-0.6B", "Qwen 3, dense"),
    "qwen3_moe": Family("qwen3_moe", "Qwen/Qwen3-30B-A3B", "Qwen 3 with routed experts"),
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
            f"{where}: model_type {model_type!r} wraps a text model ({kind}) with parts for images or sound, but ftjax "
            f"supports text models only; {instead}. Supported are {', '.join(sorted(FAMILIES))}"
        )
    raise UserError(
        f"{where}: model_type {model_type!r} is not supported; supported families are {', '.join(sorted(FAMILIES))}"
    )
