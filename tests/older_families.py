"""What transformers 4.57 lacks, beside the families of cases.py."""

UNKNOWN = {  # model types
    "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "glm4_moe_lite", "lfm2_moe", "ministral3", "nemotron_h",
    "olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
}  # fmt: skip
LATER = {"mistral3"}  # cases with a text model of those
