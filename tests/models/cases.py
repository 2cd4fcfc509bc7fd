"""Lists tiny configurations, on which every law is tried; each optional feature of a family is on in at least one."""

from oracle import Case

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
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
]  # fmt: skip

ONE_OF_EACH = list({case.model_type: case for case in reversed(CASES)}.values())[::-1]
