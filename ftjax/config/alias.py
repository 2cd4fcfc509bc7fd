"""Other tools' names of ftjax's keys and values.

`ALIASES` and `VALUES` are accepted with a note: they have exactly the same meaning or are converted exactly. `EXPLAINED`
are refused with the key to use: their meaning is similar, or ftjax needs no setting for it. The tools are transformers'
TrainingArguments, PEFT, TRL, axolotl, LLaMA-Factory, torchtune and LitGPT.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Alias:
    """Another tool's name of a key.

    Attributes:
        target: ftjax's dotted key.
        convert: converts the value to ftjax's terms; the text of a ValueError becomes the message.
        per_device: the value counts rows per device, so it is multiplied by the number of data-parallel devices.
        per_micro_batch: it is also multiplied by gradient_accumulation_steps.
        switch: true means this value of the target; false only that it is another.
    """

    target: str
    convert: Callable[[Any], Any] | None = None
    per_device: bool = False
    per_micro_batch: bool = False
    switch: str | None = None


def _listed(value: Any) -> Any:
    """Split a list that LLaMA-Factory writes as `a,b`."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _lora_target(value: Any) -> Any:
    return "all-linear" if value in ("all", ["all"], "all-linear") else _listed(value)


def _all_linear(value: Any) -> Any:
    if value is True:
        return "all-linear"
    raise ValueError("only `true` can be converted; list the modules in method.target_modules instead")


def _checkpointing(value: Any) -> Any:
    if isinstance(value, bool):
        return "full" if value else "none"
    raise ValueError("only true and false can be converted; write model.remat: auto, none, dots or full")


def _adamw(value: Any) -> Any:
    return "adamw" if value in ("adamw_torch", "adamw_torch_fused", "adamw_hf") else value


def _bits(value: Any) -> Any:
    if value in (4, 8):
        return {4: "nf4", 8: "int8"}[value]
    raise ValueError("only 4 and 8 bits can be converted; write model.quantization: nf4, int8 or null")


def _method(value: Any) -> Any:
    """Return the method of axolotl's `adapter:`, which is empty for full fine-tuning."""
    return "full" if value is None else _lower(value)


def _last(value: Any) -> Any:
    """Return the number of last layers; a negative number counts from the first layer in LLaMA-Factory and is refused."""
    if isinstance(value, int) and value > 0:
        return value
    raise ValueError("only the last layers can be counted; name others in method.train")


def _negated(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    raise ValueError("only true and false can be converted; write data.train_on_inputs")


def _split_tokens(value: Any) -> Any:
    if isinstance(value, bool):
        return "split" if value else "encode"
    raise ValueError("only true and false can be converted; write data.special_tokens_in_text: split, encode or error")


def _percent(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value / 100
    raise ValueError("only a number can be converted; write data.validation_split: a share of the rows, or how many")


def _text_field(value: Any) -> Any:
    return {"text": value}


def _truncated(value: Any) -> Any:
    return {"keep_start": "right", "keep_end": "left"}.get(value, value) if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _stage(value: Any) -> Any:
    """Return the objective of LLaMA-Factory's `stage`, whose stages `pt` and `ppo` are none."""
    name = _lower(value)
    if name in ("sft", "dpo", "kto", "rm"):
        return {"rm": "reward"}.get(name, name)
    raise ValueError("only sft, dpo, kto and rm can be converted; write objective.name (text is trained by sft as it is)")


def _same(target: str, *names: str, convert: Callable[[Any], Any] | None = None) -> dict[str, Alias]:
    return {name: Alias(target, convert) for name in names}


ALIASES: dict[str, Alias] = {
    **_same("model.path", "base_model", "model_name_or_path", "model_name", "model_id", "pretrained_model_name_or_path"),
    **_same("model.revision", "model_revision", "revision_of_model"),
    **_same("model.tokenizer", "tokenizer_name_or_path", "tokenizer_name", "tokenizer_path"),
    **_same("model.dtype", "torch_dtype"),
    **_same("model.add_tokens", "tokens", "new_tokens", convert=_listed),
    **_same("model.add_special_tokens", "new_special_tokens", "additional_special_tokens", convert=_listed),
    **_same("method.last_layers", "freeze_trainable_layers", convert=_last),
    **_same("model.remat", "gradient_checkpointing", convert=_checkpointing),
    "load_in_4bit": Alias("model.quantization", switch="nf4"),
    "load_in_8bit": Alias("model.quantization", switch="int8"),
    **_same("model.quantization", "quantization_bit", convert=_bits),
    "bf16": Alias("model.compute_dtype", switch="bfloat16"),
    "fp16": Alias("model.compute_dtype", switch="float16"),
    **_same("method.name", "finetuning_type", "peft_type", convert=_lower),
    **_same("method.name", "adapter", convert=_method),
    **_same("method.r", "lora_r", "lora_rank", "rank"),
    **_same("method.lora_alpha", "alpha"),
    **_same("method.target_modules", "lora_target_modules"),
    **_same("method.target_modules", "lora_target", convert=_lora_target),
    **_same("method.target_modules", "lora_target_linear", convert=_all_linear),
    **_same("method.modules_to_save", "lora_modules_to_save"),
    **_same("method.modules_to_save", "additional_target", convert=_listed),
    **_same("method.use_rslora", "lora_use_rslora", "peft_use_rslora"),
    **_same("method.layers_to_transform", "peft_layers_to_transform"),
    **_same("method.adapter_path", "adapter_name_or_path", "lora_model_dir"),
    **_same("data.train", "train_file", "dataset", "dataset_name", "train_data"),
    **_same("data.validation", "validation_file", "eval_dataset", "val_file", "validation_data"),
    **_same("data.max_length", "sequence_len", "cutoff_len", "max_seq_length", "max_seq_len", "model_max_length"),
    **_same("data.max_length", "seq_length", "seq_len", "sequence_length", "block_size"),
    **_same("data.packing", "sample_packing"),
    **_same("data.limit", "max_samples"),
    **_same("data.delimiter", "sep"),
    **_same("data.columns", "dataset_text_field", convert=_text_field),
    **_same("data.validation_split", "val_size", "val_set_size", "val_split_fraction"),
    **_same("data.validation_split", "validation_split_percentage", convert=_percent),
    **_same("data.special_tokens_in_text", "split_special_tokens", convert=_split_tokens),
    **_same("data.train_on_inputs", "train_on_prompt"),
    **_same("data.train_on_inputs", "completion_only_loss", convert=_negated),
    **_same("data.last_turn_only", "mask_history"),
    **_same("data.truncation", "truncation_mode", convert=_truncated),
    **_same("data.num_proc", "dataset_num_proc", "preprocessing_num_workers", "dataset_processes"),
    **_same("objective.name", "rl", convert=_lower),
    **_same("objective.name", "stage", convert=_stage),
    "reward_model": Alias("objective.name", switch="reward"),
    **_same("objective.beta", "pref_beta", "rl_beta", "dpo_beta", "kto_beta", "simpo_beta", "cpo_beta"),
    **_same("objective.beta", "orpo_beta", "orpo_alpha"),
    **_same("objective.loss_type", "pref_loss", "dpo_loss", convert=_lower),
    **_same("objective.loss_type", "dpo_loss_type"),
    **_same("objective.loss_weights", "dpo_loss_weights"),
    **_same("objective.desirable_weight", "kto_desirable_weight", "kto_chosen_weight"),
    **_same("objective.undesirable_weight", "kto_undesirable_weight", "kto_rejected_weight"),
    **_same("objective.rewards", "reward_funcs", "reward_functions", convert=_listed),
    **_same("objective.num_generations", "num_samples_per_prompt", "rollouts_per_prompt", "group_size"),
    **_same("objective.logged_completions", "num_completions_to_print"),
    **_same("objective.teacher_model_name_or_path", "teacher", "teacher_model", "teacher_model_path"),
    **_same("objective.crossentropy_weight", "uld_crossentropy_weight", "kd_ce_alpha"),
    **_same("objective.distillation_weight", "uld_distillation_weight", "kd_alpha"),
    **_same("objective.importance_sampling_correction", "vllm_importance_sampling_mode"),
    **_same("objective.importance_sampling_clip_min", "vllm_importance_sampling_clip_min"),
    **_same("objective.importance_sampling_clip_max", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
    **_same("optimizer.learning_rate", "lr"),
    **_same("optimizer.name", "optim", convert=_adamw),
    **_same("optimizer.lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"),
    **_same("optimizer.adam_beta1", "beta1"),
    **_same("optimizer.adam_beta2", "beta2"),
    **_same("optimizer.adam_epsilon", "adam_eps"),
    **_same("optimizer.max_grad_norm", "grad_clip", "gradient_clipping", "gradient_clip_val", "clip_grad_norm"),
    **_same("optimizer.warmup_steps", "lr_warmup_steps", "num_warmup_steps"),
    **_same("training.num_train_epochs", "num_epochs", "epochs"),
    **_same("training.max_steps", "max_train_steps", "num_steps", "total_steps"),
    **_same("training.global_batch_size", "train_batch_size", "effective_batch_size", "total_batch_size"),
    "micro_batch_size": Alias("training.global_batch_size", per_device=True, per_micro_batch=True),
    "per_device_train_batch_size": Alias("training.global_batch_size", per_device=True, per_micro_batch=True),
    **_same("training.gradient_accumulation_steps", "grad_accum", "gradient_accumulation", "accumulate_grad_batches"),
    **_same("training.gradient_accumulation_steps", "gradient_accumulation_iters"),
    "per_device_eval_batch_size": Alias("training.eval_batch_size", per_device=True),
    "eval_micro_batch_size": Alias("training.eval_batch_size", per_device=True),
    **_same("training.eval_steps", "eval_interval", "eval_every"),
    **_same("training.save_steps", "save_interval", "save_every", "checkpoint_interval"),
    **_same("training.logging_steps", "log_interval", "log_every", "log_steps", "log_every_n_steps"),
    **_same("training.save_total_limit", "max_checkpoints"),
    **_same("training.seed", "random_seed"),
}

# Keys that exist in several sections, and the one usually meant outside those sections.
MEANT = {"seed": "training.seed", "dtype": "model.dtype"}
UNCLEAR = ("path", "template", "freeze", "head")  # keys with other meanings in other tools
_DTYPES = {
    name: kind
    for kind, names in {
        "bfloat16": ("bf16", "torch.bfloat16"),
        "float16": ("fp16", "half", "torch.float16", "torch.half"),
        "float32": ("fp32", "float", "torch.float32", "torch.float"),
    }.items()
    for name in names
}
_LORA = {"method.name": "lora"}
_REWARD = {"objective.name": "reward"}
_DISTILL = {"objective.name": "distill"}
_ADAMW = {"optimizer.name": "adamw"}
_ADAMW_8BIT = {**_ADAMW, "optimizer.state_dtype": "int8"}

# Values that other tools know, in lower case with `_`, and the equivalent keys here.
VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "method.name": {
        "qlora": {**_LORA, "model.quantization": "nf4"},
        "dora": {**_LORA, "method.use_dora": True},
        "qdora": {**_LORA, "method.use_dora": True, "model.quantization": "nf4"},
        "rslora": {**_LORA, "method.use_rslora": True},
        "pissa": {**_LORA, "method.init_lora_weights": "pissa"},
    },
    "objective.name": {
        **{
            name: {"objective.name": name}
            for name in ("sft", "dpo", "simpo", "cpo", "orpo", "kto", "reward", "grpo", "rloo", "distill")
        },
        **dict.fromkeys(("distillation", "gkd", "kd"), _DISTILL),
        **dict.fromkeys(("rm", "reward_model", "reward_modeling"), _REWARD),
        "ipo": {"objective.name": "dpo", "objective.loss_type": "ipo"},
    },
    "optimizer.name": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla"), _ADAMW),
        **dict.fromkeys(("paged_adamw", "paged_adamw_32bit", "adamw_32bit", "torch.optim.adamw"), _ADAMW),
        **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), _ADAMW_8BIT),
    },
    "optimizer.lr_scheduler_type": {"wsd": {"optimizer.lr_scheduler_type": "warmup_stable_decay"}},
    "model.quantization": {
        name: {"model.quantization": kind}
        for kind, names in {
            "nf4": ("4bit", "4_bit", "bnb_4bit", "bitsandbytes_4bit"),
            "int8": ("8bit", "8_bit", "bnb_8bit", "bitsandbytes_8bit"),
        }.items()
        for name in names
    },
    **{
        key: {name: {key: kind} for name, kind in _DTYPES.items()}
        for key in ("model.dtype", "model.compute_dtype", "evaluate.dtype", "optimizer.param_dtype", "optimizer.state_dtype")
    },
}
CASELESS = ("method.name", "optimizer.name", "optimizer.lr_scheduler_type")  # `AdamW` means `adamw`

_QUANTIZED = "write model.quantization: int8 or nf4"
_MESH = "write the device layout in mesh: {data, fsdp, tensor, sequence}; mesh.fsdp: -1 shards over all devices"
_STEPS = "write how often in steps, in training.eval_steps, training.save_steps and training.logging_steps"
_PAIR_LENGTH = (
    "leave it out: data.max_length is the length of a row of the batch, which holds the chosen and the rejected conversation; "
    "data.truncation says what becomes of longer ones. Objectives that generate leave out prompts that do not fit into it "
    "beside objective.max_completion_length"
)
_REFERENCE = (
    "leave it out: the reference is the model before training, with the adapter of method.adapter_path if there is one; an "
    "adapter that is trained shares its weights"
)
_AND_SFT = (
    "write objective.loss_type: [sigmoid, sft] and objective.loss_weights: [1, FACTOR]; orpo and cpo have such a term too"
)
_TEMPLATE = "the tokenizer's own chat template is used; write another in model.chat_template"

EXPLAINED: dict[str, str] = {
    "quantization_config": _QUANTIZED,
    "bnb_4bit_quant_type": _QUANTIZED,
    "tf32": "matrix products follow model.compute_dtype",
    "precision": "write model.dtype and model.compute_dtype",
    "mixed_precision": "write model.dtype and model.compute_dtype",
    "attn_implementation": "write model.attention: auto, xla, blockwise, splash or cudnn",
    "flash_attention": "write model.attention: auto, which takes the fastest kernel that the device has",
    "flash_attn": "write model.attention: auto, which takes the fastest kernel that the device has",
    "trust_remote_code": "code from model repositories is never run",
    "fan_in_fan_out": "taken from the base model",
    "batch_size": "tools differ in what it counts; write training.global_batch_size: rows over all devices for one update",
    "datasets": "write one path or Hub id in data.train, or a list of {path, weight, format, columns}",
    "assistant_only_loss": "leave it out: only the assistant's turns are trained unless data.train_on_inputs is true",
    "prompt_template": _TEMPLATE,
    "unfrozen_parameters": "write method: {name: full, train: [PATTERNS]}; a pattern is found anywhere in a name",
    "deepspeed": _MESH,
    "fsdp": _MESH,
    "fsdp_config": _MESH,
    "tensor_parallel_size": _MESH,
    "eval_strategy": _STEPS,
    "evaluation_strategy": _STEPS,
    "save_strategy": _STEPS,
    "logging_strategy": _STEPS,
    "evals_per_epoch": _STEPS,
    "saves_per_epoch": _STEPS,
    "load_best_model_at_end": "the best model is always kept in best/ if there is validation data",
    "resume_from_checkpoint": "leave it out: a run resumes by itself when output_dir holds a checkpoint of it",
    "overwrite_output_dir": "leave it out: choose another output_dir, or remove the old folder",
    "auto_resume_from_checkpoints": "leave it out: a run resumes by itself when output_dir holds a checkpoint of it",
    "hub_model_id": "push afterwards: ftjax export RUN --out DIR --push-to-hub REPO",
    "push_to_hub": "push afterwards: ftjax export RUN --out DIR --push-to-hub REPO",
    "wandb_project": "write training.report_to: [wandb] and set the environment variable WANDB_PROJECT",
    "use_wandb": "write training.report_to: [wandb]",
    "do_train": "leave it out: the verb says what is done (ftjax train, ftjax evaluate)",
    "do_eval": "leave it out: evaluation runs where data.validation is given",
    **dict.fromkeys(("max_prompt_length", "max_target_length"), _PAIR_LENGTH),
    **dict.fromkeys(("ref_model", "ref_model_adapters", "ref_adapter_name", "ref_model_init_kwargs"), _REFERENCE),
    **dict.fromkeys(("model_adapter_name", "force_use_ref_model", "ref_model_quantization_bit"), _REFERENCE),
    "reward_weights": "write the weight beside each reward: objective.rewards: [{name: NAME, weight: FACTOR}]",
    "vllm_importance_sampling_correction": "write objective.importance_sampling_correction: token_truncate, token_mask, "
    "sequence_truncate or sequence_mask",
    "log_completions": "write objective.logged_completions: how many answers are logged with their rewards",
    **dict.fromkeys(
        ("generation_batch_size", "steps_per_generation"),
        "leave it out: each update has answers of its own, training.global_batch_size of them; objective.num_iterations uses "
        "them for several updates, and objective.generation_batch_rows says how many are generated at a time",
    ),
    **dict.fromkeys(
        (
            "use_vllm",
            "vllm_mode",
            "vllm_gpu_memory_utilization",
            "vllm_server_host",
            "vllm_server_port",
            "use_transformers_paged",
        ),
        "leave it out: answers are generated by ftjax itself, with the weights in training",
    ),
    "seq_kd": "generate the teacher's answers first (ftjax generate TEACHER --prompts FILE), and train on them",
    "teacher_model_init_kwargs": "leave it out: a teacher is held in model.dtype and computes in model.compute_dtype",
    "loss_add_tail": "leave it out: the tokens beyond objective.loss_top_k are always one outcome",
    "kd_ratio": "write objective.distillation_weight: this ratio, and objective.crossentropy_weight: one minus it",
    "precompute_ref_batch_size": "leave it out: the reference sees the batches of training",
    **dict.fromkeys(("pref_ftx", "dpo_ftx", "rpo_alpha"), _AND_SFT),
    "dpo_label_smoothing": "write objective.label_smoothing, which the losses robust, exo_pair, aot and aot_unpaired use",
    "gamma_beta_ratio": "write objective.simpo_gamma: this ratio times objective.beta",
    "pref_bco_weight": "write objective.loss_type: [sigmoid, bco_pair] and objective.loss_weights: [1, FACTOR]",
    **dict.fromkeys(("dpo_use_weighting", "use_weighting"), "WPO is not supported; leave it out"),
    "generate_during_eval": "write evaluate.training_examples: how many rows of the validation data an evaluation answers",
    "disable_dropout": "leave it out: the only dropout is method.lora_dropout, which is 0",
    "padding_free": "leave it out: data.packing fills rows with several pairs",
    **dict.fromkeys(
        ("label_pad_token_id", "padding_value", "is_encoder_decoder", "dpo_padding_free"),
        "leave it out: every token has its weight in the loss, and padding has none",
    ),
    **dict.fromkeys(
        ("use_logits_to_keep", "dpo_use_logits_to_keep", "use_liger_loss", "use_liger_kernel"),
        "leave it out: logits are computed for objective.loss_chunk tokens at a time, and only where a token is trained",
    ),
    **dict.fromkeys(
        ("num_workers", "dataloader_num_workers"),
        "leave it out: reading keeps ahead of the step by itself; data.num_proc says how many processes tokenise",
    ),
    "dataloader_pin_memory": "leave it out: batches are copied while the step before them runs",
    "remove_unused_columns": "leave it out: columns that nothing reads are named in the report, and not used",
    "group_by_length": "leave it out: data.packing fills rows with several texts, so that little is padding",
    "train_on_eos": "leave it out: the end of each trained turn is trained, and no other (as with `turn`); "
    "data.train_on_inputs: true trains every token",
    "train_on_eot": "leave it out: the end of each trained turn is trained, and no other (as with `turn`)",
    "roles_to_train": "leave it out: the assistant's turns are trained; a message's own `train: false` leaves it out",
    **dict.fromkeys(
        ("eval_split", "validation_split_name", "dataset_test_split", "test_split"),
        "write data.validation: {path: HUB_ID, split: NAME}, or a share of the rows of train in data.validation_split",
    ),
    "dataset_train_split": "write data.train: {path: HUB_ID, split: NAME}",
    "test_datasets": "write a path, a Hub id or a list of {path, weight, split, ...} in data.validation",
}


def plain_name(key: str) -> str:
    """Normalise a key for lookup: `learning-rate` and `Learning_Rate` become `learning_rate`."""
    return key.strip().lower().replace("-", "_").replace(" ", "_")
