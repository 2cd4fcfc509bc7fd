"""Tests config.json files of well-known checkpoints as published: they are accepted, and give the real model's size."""

import pytest

from ftjax.models.facts import complete_config
from ftjax.models.model import build_module
from ftjax.models.nn.param import specs

COMMON = {
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
GEMMA = {**COMMON, "bos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-6, "head_dim": 256}
DEEPSEEK = {
    **COMMON, "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu", "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_layer_freq": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "seq_aux": True, "tie_word_embeddings": False, "v_head_dim": 128,
    "pretraining_tp": 1,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
GLM = {
    **COMMON, "eos_token_id": [151329, 151336, 151338], "hidden_act": "silu", "pad_token_id": 151329,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
    "vocab_size": 151552,
}  # fmt: skip
LLAMA4 = {
    **COMMON, "model_type": "llama4_text", "_attn_implementation_autoset": True, "attention_chunk_size": 8192,
    "bos_token_id": 200000, "eos_token_id": [200001, 200007, 200008], "for_llm_compressor": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760, "no_rope_layers": [], "num_attention_heads": 40,
    "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16,
    "output_router_logits": False, "pad_token_id": 200018, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "use_qk_norm": True, "vocab_size": 202048,
}  # fmt: skip
GEMMA4 = {
    **GEMMA, "model_type": "gemma4_text", "attention_k_eq_v": False, "enable_moe_block": False, "eos_token_id": 1,
    "expert_intermediate_size": None, "final_logit_softcapping": 30.0, "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1536, "hidden_size_per_layer_input": 256,
    "intermediate_size": 6144, "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    "max_position_embeddings": 131072, "num_attention_heads": 8, "num_experts": None, "num_global_key_value_heads": None,
    "num_hidden_layers": 35, "num_key_value_heads": 1, "num_kv_shared_layers": 20, "sliding_window": 512,
    "tie_word_embeddings": True, "top_k_experts": None, "use_bidirectional_attention": None, "use_double_wide_mlp": True,
    "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}  # fmt: skip
NEMOTRON3 = {
    "model_type": "nemotron_h", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "chunk_size": 128,
    "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "initializer_range": 0.02,
    "intermediate_size": 1856, "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64, "mamba_hidden_act": "silu",
    "mamba_num_heads": 64, "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144,
    "mlp_bias": False, "mlp_hidden_act": "relu2", "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712, "n_group": 1, "n_groups": 8, "n_routed_experts": 128,
    "n_shared_experts": 1, "norm_eps": 1e-05, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6,
    "num_hidden_layers": 52, "num_key_value_heads": 2, "num_logits_to_keep": 1, "pad_token_id": 0,
    "partial_rotary_factor": 1.0, "rescale_prenorm_residual": True, "residual_in_fp32": False, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "sliding_window": None, "ssm_state_size": 128, "tie_word_embeddings": False,
    "time_step_floor": 0.0001, "time_step_max": 0.1, "time_step_min": 0.001, "topk_group": 1, "torch_dtype": "bfloat16",
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072,
}  # fmt: skip
PUBLISHED = {
    "google/gemma-4-E2B-it": (4_628_569_379, {
        "model_type": "gemma4", "text_config": GEMMA4, "audio_token_id": 258881, "boa_token_id": 256000,
        "boi_token_id": 255999, "eoa_token_id": 258883, "eoa_token_index": 258883, "eoi_token_id": 258882,
        "eos_token_id": [1, 106], "image_token_id": 258880, "tie_word_embeddings": True, "video_token_id": 258884,
        "vision_soft_tokens_per_image": 280, "vision_config": {"model_type": "gemma4_vision", "use_clipped_linears": True},
        "audio_config": {"model_type": "gemma4_audio"},
    }),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (107_769_861_120, {
        "model_type": "llama4", "text_config": LLAMA4, "boi_token_index": 200080, "eoi_token_index": 200081,
        "image_token_index": 200092, "vision_config": {"model_type": "llama4_vision_model"}, "torch_dtype": "bfloat16",
    }),
    "microsoft/Phi-3.5-MoE-instruct": (41_873_153_344, {
        **COMMON, "model_type": "phimoe", "attention_bias": True, "bos_token_id": 1, "eos_token_id": 32000,
        "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 4096, "input_jitter_noise": 0.01,
        "intermediate_size": 6400, "lm_head_bias": True, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16,
        "original_max_position_embeddings": 4096, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.1] * 64, "short_mscale": 1.243163121016122,
            "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096,
        },
        "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072, "tie_word_embeddings": False,
        "vocab_size": 32064,
    }),
    "google/gemma-2b": (2_506_172_416, {
        **GEMMA, "model_type": "gemma", "eos_token_id": 1, "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192, "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
    }),
    "google/gemma-2-2b-it": (2_614_341_888, {
        **GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "eos_token_id": [1, 107], "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "vocab_size": 256000,
    }),
    "google/gemma-3-1b-it": (999_885_952, {
        **GEMMA, "model_type": "gemma3_text", "attn_logit_softcapping": None, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    }),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, {
        "model_type": "mixtral", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 32000,
    }),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, {
        **COMMON, "model_type": "qwen3_moe", "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    }),
    "openai/gpt-oss-20b": (20_914_757_184, {
        **COMMON, "model_type": "gpt_oss", "attention_bias": True, "eos_token_id": 200002, "experts_per_token": 4,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
        "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
        "rms_norm_eps": 1e-5, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "tie_word_embeddings": False, "vocab_size": 201088,
    }),
    "deepseek-ai/DeepSeek-V3": (671_026_419_200, {
        **DEEPSEEK, "model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "topk_group": 4, "topk_method": "noaux_tc", "vocab_size": 129280,
    }),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": (15_706_484_224, {
        **DEEPSEEK, "model_type": "deepseek_v2", "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "vocab_size": 102400,
    }),
    "zai-org/GLM-4.7-Flash": (29_943_393_920, {
        **GLM, "model_type": "glm4_moe_lite", "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10240,
        "kv_lora_rank": 512, "max_position_embeddings": 202752, "moe_intermediate_size": 1536, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 20,
        "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20, "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
        "rope_theta": 1000000, "routed_scaling_factor": 1.8, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 256,
        "vocab_size": 154880,
    }),
    "zai-org/GLM-4-9B-0414": (9_400_279_040, {
        **GLM, "model_type": "glm4", "attention_bias": True, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 13696,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
        "rope_theta": 10000.0,
    }),
    "zai-org/GLM-4.5-Air": (106_852_251_264, {
        **GLM, "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128,
        "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072, "moe_intermediate_size": 1408,
        "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
        "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
        "rope_theta": 1000000, "routed_scaling_factor": 1.0, "topk_group": 1, "use_qk_norm": False,
    }),
    "ibm-granite/granite-3.0-1b-a400m-instruct": (1_334_628_352, {
        **COMMON, "model_type": "granitemoe", "attention_multiplier": 0.015625, "bos_token_id": 0,
        "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 512,
        "logits_scaling": 6.0, "max_position_embeddings": 4096, "num_attention_heads": 16, "num_experts_per_tok": 8,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
        "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000,
        "router_aux_loss_coef": 0.0, "tie_word_embeddings": True, "vocab_size": 49155,
    }),
    "ibm-granite/granite-4.0-h-small": (32_207_337_984, {
        **COMMON, "model_type": "granitemoehybrid", "attention_multiplier": 0.0078125, "bos_token_id": 100257,
        "embedding_multiplier": 12, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "init_method": "mup",
        "intermediate_size": 768, "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4, "logits_scaling": 16,
        "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128,
        "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": False,
        "max_position_embeddings": 131072, "normalization_function": "rmsnorm", "num_attention_heads": 32,
        "num_experts_per_tok": 10, "num_hidden_layers": 40, "num_key_value_heads": 8, "num_local_experts": 72,
        "output_router_logits": False, "pad_token_id": 100256, "position_embedding_type": "nope", "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.0,
        "shared_intermediate_size": 1536, "tie_word_embeddings": True, "vocab_size": 100352,
    }),
    "LiquidAI/LFM2-8B-A1B": (8_339_929_856 + 22 * 32, {  # and the biases of the routers, which transformers has as buffers
        "model_type": "lfm2_moe", "bos_token_id": 1, "conv_L_cache": 3, "conv_bias": False, "eos_token_id": 7,
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 7168, "layer_types": [
            "conv", "conv", *["full_attention", "conv", "conv", "conv"] * 4, *["full_attention", "conv", "conv"] * 2,
        ],
        "max_position_embeddings": 128000, "moe_intermediate_size": 1792, "norm_eps": 1e-5, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "pad_token_id": 0, "rope_theta": 1000000.0,
        "routed_scaling_factor": 1.0, "tie_embedding": True, "torch_dtype": "bfloat16", "use_cache": True,
        "use_expert_bias": True, "vocab_size": 65536,
    }),
    "allenai/OLMoE-1B-7B-0924": (6_919_161_856, {
        **COMMON, "model_type": "olmoe", "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
    }),
}  # fmt: skip


QWEN3_5 = {
    "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "image_token_id": 248056,
    "language_model_only": False, "tie_word_embeddings": False, "video_token_id": 248057, "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "bos_token_id": 248044,
        "dtype": "bfloat16", "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
        "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 17408,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "num_attention_heads": 24,
        "num_hidden_layers": 64, "num_key_value_heads": 4, "output_gate_type": "swish", "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 248320,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25, "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
    "vision_config": {"model_type": "qwen3_5", "depth": 27, "hidden_size": 1152, "out_hidden_size": 5120},
}  # fmt: skip


def test_published_config_of_nemotron_3():
    """nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16: 23 layers of Mamba-2, 23 with 128 experts, and 6 of attention."""
    root = build_module(complete_config(NEMOTRON3, "Nemotron-3-Nano"))
    embed, heads, channels = 2688, 64, 64 * 64 + 2 * 8 * 128
    mamba = embed * (64 * 64 + channels + heads) + 5 * channels + 3 * heads + 64 * 64 * (1 + embed)
    experts = 128 * (embed + 1) + 2 * embed * (128 * 1856 + 3712)
    attention = embed * 2 * (32 + 2) * 128
    layers = 23 * (mamba + experts) + 6 * attention + 52 * embed
    assert sum(spec.size for spec in specs(root).values()) == 2 * 131072 * embed + embed + layers
    assert root.notes == ()


def test_published_config_of_a_composite():
    """Qwen/Qwen3.5-27B: all fields beside those that transformers knows are read; two tables of 5120 by 248320, 64 layers."""
    root = build_module(complete_config(QWEN3_5, "Qwen3.5-27B"))
    mlp, norms = 3 * 17408, 2
    attention = 2 * 24 * 256 + 2 * 4 * 256 + 24 * 256
    channels = 2 * 16 * 128 + 48 * 128
    linear = channels + 2 * 48 * 128 + 2 * 48
    layers = 64 * (mlp + norms) + 16 * attention + 48 * linear
    vectors = 16 * 2 * 256 + 48 * (4 * channels + 2 * 48 + 128)
    assert sum(spec.size for spec in specs(root).values()) == 5120 * (2 * 248320 + 1 + layers) + vectors
    assert root.notes == ()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    size, config = PUBLISHED[name]
    root = build_module(complete_config(config, name))
    assert sum(spec.size for spec in specs(root).values()) == size
