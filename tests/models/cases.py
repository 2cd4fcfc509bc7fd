"""Lists tiny configurations, on which every law is tried; each optional feature of a family is on in at least one."""

from oracle import Case
from processes import ALL

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

SIGLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

IMAGES = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
    "num_position_embeddings": 16, "patch_size": 2,
}  # fmt: skip

EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3}
LATENT = {
    **EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}  # fmt: skip

CASES: list[Case] = [
    Case("llama", "llama"),
    Case("llama-tied-biases", "llama", {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12, "hidden_act": "gelu",
        "rms_norm_eps": 1e-3, "num_key_value_heads": 4,
    }),
    Case("llama3.1", "llama", {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 2}),
    Case("llama-linear", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    Case("llama-dynamic", "llama", {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}, "max_position_embeddings": 16,
    }),
    Case("llama-yarn", "llama", {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0,
        },
    }),
    Case("gemma", "gemma", {"head_dim": 12, "num_key_value_heads": 1}, tensor=1),
    Case("gemma-untied", "gemma", {
        "head_dim": 8, "tie_word_embeddings": False, "attention_bias": True, "hidden_act": "silu", "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    }),
    Case("gemma2", "gemma2", {
        "head_dim": 12, "num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0,
    }),
    Case("gemma2-uncapped", "gemma2", {
        "head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False,
        "attention_bias": True, "hidden_activation": "gelu", "num_hidden_layers": 5, "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": LLAMA3_ROPE,
    }),
    Case("gemma3", "gemma3_text", {
        "head_dim": 12, "num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 20, "final_logit_softcapping": 6.0, "attn_logit_softcapping": 4.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    }),
    Case("gemma3-ropes", "gemma3_text", {
        "head_dim": 8, "num_hidden_layers": 3, "sliding_window": 6, "tie_word_embeddings": False, "attention_bias": True,
        "hidden_activation": "silu", "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
            },
            "sliding_attention": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 2.0},
        },
        "max_position_embeddings": 32,
    }),
    Case("gemma4", "gemma4_text", {
        "head_dim": 12, "global_head_dim": 16, "num_key_value_heads": 2, "num_global_key_value_heads": 1,
        "num_hidden_layers": 4, "sliding_window": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 98, "attention_k_eq_v": True,
        "final_logit_softcapping": 6.0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 16, "rms_norm_eps": 1e-3, "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    }),
    Case("gemma4-dense", "gemma4_text", {
        "head_dim": 8, "global_head_dim": 8, "num_hidden_layers": 5, "sliding_window": 6, "tie_word_embeddings": False,
        "attention_bias": True, "hidden_activation": "silu", "hidden_size_per_layer_input": 0, "num_key_value_heads": 4,
        "use_bidirectional_attention": "vision",
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 500.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
        },
    }),
    Case("gemma4-own-inputs", "gemma4_text", {
        "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 6, "sliding_window": 6,
        "hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": 96, "final_logit_softcapping": 6.0,
    }),
    Case("gemma4-images-and-sound", "gemma4", {
        "text_config": {
            "model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 8, "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 4, "num_kv_shared_layers": 4,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        },
        "vision_config": {**SIGLIP, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 8},
        "audio_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [4, 4],
            "output_proj_dims": 12,
        },
        "image_token_id": 200, "audio_token_id": 201, "video_token_id": 202,
    }),
    Case("gemma4-unified", "gemma4_unified_text", {
        "head_dim": 12, "global_head_dim": 16, "num_key_value_heads": 2, "num_global_key_value_heads": 1,
        "num_hidden_layers": 5, "sliding_window": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "attention_k_eq_v": True, "final_logit_softcapping": 6.0, "rms_norm_eps": 1e-3,
    }),
    Case("gemma4-unified-images", "gemma4_unified", {
        "text_config": {
            "model_type": "gemma4_unified_text", "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 3,
            "sliding_window": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "vision_config": {"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 8,
                          "output_proj_dims": 16},
        "audio_config": {"audio_embed_dim": 8}, "image_token_id": 200, "audio_token_id": 201, "video_token_id": 202,
    }),
    Case("mixtral", "mixtral", {"num_local_experts": 4, "num_hidden_layers": 3, "output_router_logits": True}),
    Case("mixtral-window", "mixtral", {
        "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 12, "tie_word_embeddings": True,
        "hidden_act": "gelu", "rms_norm_eps": 1e-3, "router_aux_loss_coef": 0.5, "rope_parameters": LLAMA3_ROPE,
    }),
    Case("qwen3-moe", "qwen3_moe", {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True,
        "num_hidden_layers": 3, "head_dim": 12,
    }),
    Case("qwen3-moe-dense-first", "qwen3_moe", {
        "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "num_hidden_layers": 4,
        "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 8, "attention_bias": True,
        "tie_word_embeddings": True, "output_router_logits": True, "rope_parameters": LLAMA3_ROPE,
    }),
    Case("qwen3-moe-every-other", "qwen3_moe", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 5,
        "decoder_sparse_step": 2, "hidden_act": "gelu",
    }),
    Case("qwen3-moe-all-dense", "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 9}),
    Case("gpt-oss", "gpt_oss", {
        "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3, "sliding_window": 8,
        "swiglu_limit": 0.7, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 16,
        },
    }),
    Case("gpt-oss-plain", "gpt_oss", {
        "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 3, "attention_bias": False, "swiglu_alpha": 1.1,
        "tie_word_embeddings": True, "output_router_logits": True, "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }),
    Case("deepseek-v3", "deepseek_v3", {
        **LATENT, "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
    }),
    Case("deepseek-v3-plain-queries", "deepseek_v3", {
        **LATENT, "q_lora_rank": None, "v_head_dim": 16, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
        "rope_interleave": False, "norm_topk_prob": False, "tie_word_embeddings": True, "hidden_act": "gelu",
        "n_shared_experts": 2, "num_mtp_layers": 0,
    }),
    Case("glm4-moe-lite", "glm4_moe_lite", {
        **LATENT, "num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "norm_topk_prob": False,
        "n_group": 2, "topk_group": 1, "n_shared_experts": 2, "rope_parameters": LLAMA3_ROPE,
    }),
    Case("glm4-moe-lite-biases", "glm4_moe_lite", {
        **LATENT, "q_lora_rank": None, "v_head_dim": 20, "rope_interleave": False, "attention_bias": True, "hidden_act": "gelu",
        "rms_norm_eps": 1e-3, "tie_word_embeddings": True, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "mscale_all_dim": 1.0,
        },
    }),
    Case("deepseek-v2", "deepseek_v2", {
        **LATENT, "num_hidden_layers": 4, "first_k_dense_replace": 2, "n_group": 4, "topk_group": 3, "mlp_bias": True,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5, "num_experts_per_tok": 2, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
    }),
    Case("deepseek-v2-groups", "deepseek_v2", {  # fewer groups than experts per token: only then do groups limit the choice
        **LATENT, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "mlp_bias": True,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
    }),
    Case("deepseek-v2-lite", "deepseek_v2", {
        **LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "attention_bias": True, "tie_word_embeddings": True,
        "hidden_act": "gelu", "rms_norm_eps": 1e-3, "n_shared_experts": 1,
    }),
    Case("glm4", "glm4", {"num_hidden_layers": 3, "head_dim": 12, "partial_rotary_factor": 0.5}),
    Case("glm4-whole-heads", "glm4", {
        "head_dim": 8, "partial_rotary_factor": 1.0, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu",
        "rms_norm_eps": 1e-3, "rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 4,
    }),
    Case("glm4-moe", "glm4_moe", {
        **EXPERTS, "num_hidden_layers": 4, "head_dim": 12, "use_qk_norm": True, "attention_bias": True, "n_group": 2,
        "topk_group": 1, "routed_scaling_factor": 1.5,
    }),
    Case("glm4-moe-plain", "glm4_moe", {
        **EXPERTS, "first_k_dense_replace": 0, "norm_topk_prob": False, "tie_word_embeddings": True, "hidden_act": "gelu",
        "rms_norm_eps": 1e-3, "n_shared_experts": 2, "num_mtp_layers": 0, "rope_parameters": {
            "rope_type": "linear", "rope_theta": 500.0, "factor": 4.0, "partial_rotary_factor": 0.75,
        },
    }),
    Case("olmoe", "olmoe", {
        "num_experts": 6, "num_experts_per_tok": 3, "num_hidden_layers": 3, "clip_qkv": 0.8, "norm_topk_prob": True,
        "attention_bias": True,
    }),
    Case("olmoe-tied", "olmoe", {
        "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "tie_word_embeddings": True, "hidden_act": "gelu",
        "rms_norm_eps": 1e-3, "output_router_logits": True, "rope_parameters": LLAMA3_ROPE,
    }),
    Case("granitemoe", "granitemoe", {
        "num_local_experts": 6, "num_experts_per_tok": 3, "num_hidden_layers": 3, "embedding_multiplier": 3.0,
        "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
    }),
    Case("granitemoe-tied-biases", "granitemoe", {
        "num_local_experts": 4, "attention_bias": True, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "hidden_act": "gelu", "rms_norm_eps": 1e-3, "output_router_logits": True, "attention_multiplier": 0.3,
        "rope_parameters": LLAMA3_ROPE,
    }),
    Case("llama4", "llama4_text", {
        "head_dim": 12, "num_hidden_layers": 5, "attention_chunk_size": 8, "floor_scale": 6, "attn_scale": 0.7,
        "no_rope_layers": [0, 1, 1, 0, 1], "intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 2, "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
    }),
    Case("llama4-plain", "llama4_text", {
        "head_dim": 8, "num_hidden_layers": 4, "attention_chunk_size": 5, "attn_temperature_tuning": False,
        "use_qk_norm": False, "attention_bias": True, "num_local_experts": 4, "num_experts_per_tok": 1,
        "moe_layers": [0, 1, 2, 3], "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True, "hidden_act": "gelu",
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention", "full_attention"],
        "rope_parameters": LLAMA3_ROPE,
    }),
    Case("llama4-images", "llama4", {
        "text_config": {
            "model_type": "llama4_text", "head_dim": 8, "num_hidden_layers": 4, "attention_chunk_size": 8, "floor_scale": 8,
            "intermediate_size_mlp": 40, "num_local_experts": 4, "interleave_moe_layer_step": 2,
        },
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
            "patch_size": 14, "vision_output_dim": 12, "projector_input_dim": 8, "projector_output_dim": 12,
        },
        "image_token_index": 200, "boi_token_index": 201, "eoi_token_index": 202,
    }),
    Case("mistral", "mistral", {"sliding_window": 8, "head_dim": 12, "num_hidden_layers": 3}),
    Case("mistral-no-window", "mistral", {
        "sliding_window": None, "tie_word_embeddings": True, "hidden_act": "gelu", "rms_norm_eps": 1e-3,
        "rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 4,
    }),
    Case("ministral", "ministral", {
        "head_dim": 12, "sliding_window": 8, "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    }),
    Case("ministral-all-windows", "ministral", {
        "head_dim": 8, "sliding_window": 5, "tie_word_embeddings": True, "hidden_act": "relu", "rms_norm_eps": 1e-3,
    }),
    Case("qwen2", "qwen2", {
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_hidden_layers": 4,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False,
        },
    }),
    Case("qwen2-tied", "qwen2", {
        "tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 12, "hidden_act": "gelu", "rms_norm_eps": 1e-3,
    }),
    Case("qwen3", "qwen3", {
        "head_dim": 12, "use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
    Case("qwen3-tied", "qwen3", {
        "head_dim": 8, "tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1, "hidden_act": "gelu",
        "rms_norm_eps": 1e-3, "rope_parameters": LLAMA3_ROPE,
    }, tensor=1),
    Case("qwen3.5", "qwen3_5_text", {
        "head_dim": 16, "num_hidden_layers": 4, "rms_norm_eps": 1e-3, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
        "linear_num_key_heads": 2, "linear_num_value_heads": 6, "rope_parameters": {
            "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }),
    Case("qwen3.5-tied", "qwen3_5_text", {
        "head_dim": 8, "num_hidden_layers": 3, "linear_key_head_dim": 12, "linear_value_head_dim": 8,
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 3, "tie_word_embeddings": True,
        "attention_bias": True, "hidden_act": "gelu", "rms_norm_eps": 1e-3,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.5,
        },
    }),
    Case("qwen3.5-images", "qwen3_5", {
        "text_config": {
            "model_type": "qwen3_5_text", "head_dim": 8, "num_hidden_layers": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 0, 0],
            },
        },
        "vision_config": IMAGES,
        "tie_word_embeddings": True, "image_token_id": 200, "video_token_id": 201,
    }),
    Case("ministral3", "ministral3", {
        "head_dim": 12, "sliding_window": 12, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7,
        },
    }),
    Case("mistral3", "mistral3", {
        "text_config": {
            "model_type": "ministral3", "tie_word_embeddings": False, "sliding_window": 9, "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 6,
                "llama_4_scaling_beta": 0.4,
            },
        },
        "vision_config": {**SIGLIP, "model_type": "pixtral"}, "image_token_index": 200, "tie_word_embeddings": False,
    }),
    Case("mistral3-mistral", "mistral3", {
        "text_config": {"model_type": "mistral", "sliding_window": 7}, "vision_config": {**SIGLIP, "model_type": "pixtral"},
        "image_token_index": 200, "tie_word_embeddings": True,
    }),
    Case("gemma3-images", "gemma3", {
        "text_config": {
            "model_type": "gemma3_text", "head_dim": 12, "num_hidden_layers": 3, "sliding_window": 8,
            "query_pre_attn_scalar": 20, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4, "image_token_index": 200,
        "boi_token_index": 201, "eoi_token_index": 202,
    }),
    Case("qwen3-vl", "qwen3_vl", {
        "text_config": {
            "model_type": "qwen3_vl_text", "head_dim": 8, "attention_bias": True, "rope_parameters": {
                "rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            },
        },
        "vision_config": {**IMAGES, "deepstack_visual_indexes": [0]},
        "image_token_id": 200, "video_token_id": 201, "tie_word_embeddings": False,
    }),
    Case("lfm2", "lfm2", {
        "num_hidden_layers": 5, "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "block_multiple_of": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
    }),
    Case("lfm2-untied", "lfm2", {
        "num_hidden_layers": 3, "full_attn_idxs": [1], "conv_L_cache": 4, "conv_bias": True, "norm_eps": 1e-3,
        "tie_word_embeddings": False, "block_auto_adjust_ff_dim": False, "num_attention_heads": 4, "num_key_value_heads": 4,
        "rope_parameters": LLAMA3_ROPE,
    }),
    Case("qwen3.5-moe", "qwen3_5_moe_text", {
        "head_dim": 8, "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rms_norm_eps": 1e-3, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
        "output_router_logits": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    }),
    Case("qwen3.5-moe-images", "qwen3_5_moe", {
        "text_config": {
            "model_type": "qwen3_5_moe_text", "head_dim": 8, "num_hidden_layers": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rms_norm_eps": 1e-3,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
        "vision_config": IMAGES, "image_token_id": 200, "video_token_id": 201,
    }),
    Case("qwen3-next", "qwen3_next", {
        "head_dim": 8, "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rms_norm_eps": 1e-3, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [1], "rope_parameters": {
            "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5,
        },
    }),
    Case("gpt2", "gpt2", {
        "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48, "scale_attn_by_inverse_layer_idx": True,
        "layer_norm_epsilon": 1e-3,
    }),
    Case("gpt2-untied", "gpt2", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": False, "scale_attn_weights": False,
        "activation_function": "gelu", "reorder_and_upcast_attn": True,
    }),
    Case("gpt-neox", "gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500, "hidden_act": "gelu_new", "num_hidden_layers": 3}),
    Case("gpt-neox-serial", "gpt_neox", {
        "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False, "layer_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0, "partial_rotary_factor": 1.0},
    }),
    Case("gpt-neox-dynamic", "gpt_neox", {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0, "partial_rotary_factor": 0.75},
    }),
    Case("phi3", "phi3", {
        "sliding_window": 8, "num_hidden_layers": 3, "max_position_embeddings": 64, "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.5, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0],
        },
    }),
    Case("phi3-plain", "phi3", {
        "tie_word_embeddings": True, "num_key_value_heads": 4, "hidden_act": "gelu", "rms_norm_eps": 1e-3, "resid_pdrop": 0.1,
        "head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }),
    Case("phi3-whole-heads", "phi3", {
        "original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5, 1.0, 2.0],
            "long_factor": [2.0, 4.0, 5.0, 6.0], "attention_factor": 1.3, "factor": 8.0,
        },
    }),
    Case("phimoe", "phimoe", {
        "num_hidden_layers": 3, "num_local_experts": 4, "router_jitter_noise": 0.2, "lm_head_bias": True,
        "attention_bias": True, "sliding_window": 9, "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5, 1.2, 1.3],
            "long_factor": [2.0, 4.0, 3.0, 3.5], "short_mscale": 1.2, "long_mscale": 0.8,
            "original_max_position_embeddings": 16,
        },
    }),
    Case("phimoe-tied", "phimoe", {
        "num_local_experts": 3, "tie_word_embeddings": True, "hidden_act": "gelu", "output_router_logits": True,
        "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }),
    Case("olmo2", "olmo2", {"num_hidden_layers": 3, "attention_bias": True}),
    Case("olmo2-tied", "olmo2", {
        "tie_word_embeddings": True, "num_key_value_heads": 4, "hidden_act": "gelu", "rms_norm_eps": 1e-3, "head_dim": 12,
        "rope_parameters": LLAMA3_ROPE,
    }),
    Case("olmo3", "olmo3", {
        "sliding_window": 8, "num_hidden_layers": 5, "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    }),
    Case("olmo3-other-layers", "olmo3", {
        "sliding_window": 5, "tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 4,
        "hidden_act": "gelu", "rms_norm_eps": 1e-3, "layer_types": ["full_attention", "sliding_attention"],
    }),
    Case("smollm3", "smollm3", {
        "num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 8,
        "tie_word_embeddings": False, "attention_bias": True, "head_dim": 12, "hidden_act": "gelu", "rms_norm_eps": 1e-3,
        "rope_parameters": LLAMA3_ROPE,
    }),
    Case("smollm3-no-windows", "smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2, "mlp_bias": True}),
    Case("granite", "granite", {
        "num_hidden_layers": 3, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.2, "attention_dropout": 0.1,
    }),
    Case("granite-tied-biases", "granite", {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12, "num_key_value_heads": 4,
        "hidden_act": "gelu", "rms_norm_eps": 1e-3, "attention_multiplier": 0.3, "rope_parameters": LLAMA3_ROPE,
    }),
    Case("bamba", "bamba", {
        "num_hidden_layers": 4, "attn_layer_indices": [2], "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 12,
        "rms_norm_eps": 1e-3,
    }),
    Case("bamba-tied-biases", "bamba", {
        "num_hidden_layers": 3, "attn_layer_indices": [0, 2], "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_conv": 3,
        "mamba_expand": 3, "mamba_proj_bias": True, "mamba_conv_bias": False, "attention_bias": True, "mlp_bias": True,
        "hidden_act": "gelu", "num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE,
    }),
    Case("granitemoehybrid", "granitemoehybrid", {
        "num_hidden_layers": 5, "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"], "mamba_n_heads": 4,
        "mamba_n_groups": 2, "mamba_d_state": 8, "shared_intermediate_size": 24, "num_local_experts": 6,
        "num_experts_per_tok": 3, "embedding_multiplier": 3, "logits_scaling": 2, "residual_multiplier": 0.5,
        "attention_multiplier": 0.2, "output_router_logits": True, "position_embedding_type": "rope",
    }),
    Case("granitemoehybrid-dense", "granitemoehybrid", {
        "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8, "mamba_d_state": 12,
        "mamba_conv_bias": False, "mamba_proj_bias": True, "attention_bias": True, "shared_intermediate_size": 40,
        "num_local_experts": 0, "attention_multiplier": 0.3, "position_embedding_type": "nope", "hidden_act": "gelu",
        "tie_word_embeddings": True, "rms_norm_eps": 1e-3,
    }),
    Case("nemotron-h", "nemotron_h", {
        **EXPERTS, "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"], "head_dim": 12,
        "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 12, "n_group": 4, "topk_group": 2,
        "moe_shared_expert_intermediate_size": 24, "moe_latent_size": 20, "routed_scaling_factor": 1.5,
        "layer_norm_epsilon": 1e-3,
    }),
    Case("nemotron-h-dense", "nemotron_h", {
        "hybrid_override_pattern": "M-*-M", "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 6, "n_groups": 1,
        "ssm_state_size": 8, "conv_kernel": 3, "mamba_hidden_act": "gelu", "mlp_hidden_act": "gelu", "mlp_bias": True,
        "use_bias": True, "use_conv_bias": False, "num_key_value_heads": 4,
    }),
    Case("falcon-h1", "falcon_h1", {
        "num_hidden_layers": 3, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 12,
        "mamba_rms_norm": True, "mamba_norm_before_gate": False, "embedding_multiplier": 2.5, "lm_head_multiplier": 0.5,
        "mlp_multipliers": [0.8, 0.6], "key_multiplier": 0.7, "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.9, "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 0.6], "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.7,
    }),
    Case("falcon-h1-norm-first", "falcon_h1", {
        "mamba_d_ssm": None, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_rms_norm": True, "mamba_norm_before_gate": True,
        "mamba_conv_bias": False, "mamba_proj_bias": True, "projectors_bias": True, "attention_bias": True, "mlp_bias": True,
        "hidden_act": "gelu", "tie_word_embeddings": True, "rms_norm_eps": 1e-3, "rope_parameters": LLAMA3_ROPE,
    }),
    Case("falcon-h1-without-norm", "falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_conv": 3}),
    Case("lfm2-moe", "lfm2_moe", {
        "num_hidden_layers": 5, "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
        "num_dense_layers": 2, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
        "routed_scaling_factor": 1.5, "norm_eps": 1e-3,
    }),
    Case("lfm2-moe-untied", "lfm2_moe", {
        "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 0, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 24, "use_expert_bias": False, "norm_topk_prob": False,
        "conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE,
    }),
    Case("olmo-hybrid", "olmo_hybrid", {
        "num_hidden_layers": 5, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 12,
        "linear_value_head_dim": 6, "rms_norm_eps": 1e-3,  # parts of equal size: transformers splits others elsewhere on saving
    }),
    Case("olmo-hybrid-rope", "olmo_hybrid", {
        "num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3, "linear_allow_neg_eigval": False,
        "attention_bias": True, "hidden_act": "gelu", "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE,
    }),
]  # fmt: skip

ONE_OF_EACH = list({case.model_type: case for case in reversed(CASES)}.values())[::-1]

# Families that are others under another name, inside a checkpoint with more parts, or with parts of two of them: on the right
# the one whose layers, and so whose golden steps and FLOPs, are theirs.
LIKE = {
    "deepseek_v2": "deepseek_v3", "gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_text",
    "gemma4_unified_text": "gemma4_text", "llama4": "llama4_text", "glm4_moe": "deepseek_v3", "glm4_moe_lite": "deepseek_v3",
    "ministral3": "mistral", "mistral3": "mistral", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_next",
    "qwen3_5_moe_text": "qwen3_next", "qwen3_vl": "qwen3", "granitemoehybrid": "bamba", "falcon_h1": "bamba",
    "lfm2_moe": "lfm2", "olmo_hybrid": "qwen3_5_text",
}  # fmt: skip
UNLIKE = [case for case in ONE_OF_EACH if case.model_type not in LIKE]

# One family for each thing that layers do in their own way: norms, positions and biases of two kinds; windows; experts, alone,
# with sinks, and beside the MLP; latents; linear attention; Mamba-2; convolutions; shared keys and values; chunks. Laws that
# compile gradients or decoding try these in `make test`, and every family in `make test-all`.
KINDS = (
    "llama", "gpt2", "gemma3_text", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_5_text", "bamba", "lfm2", "gemma4_text",
    "llama4_text",
)  # fmt: skip
OF_EACH_KIND = ONE_OF_EACH if ALL else [case for case in ONE_OF_EACH if case.model_type in KINDS]

# Laws whose failure in one kind of layer another law of `make test` would show too try these there.
FEW_KINDS = ("llama", "gpt_oss", "deepseek_v3", "qwen3_5_text", "gemma4_text")
FEW = ONE_OF_EACH if ALL else [case for case in ONE_OF_EACH if case.model_type in FEW_KINDS]
