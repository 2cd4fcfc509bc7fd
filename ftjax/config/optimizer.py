"""`optimizer:` -- AdamW, its schedule and its parameter groups. Names are transformers' TrainingArguments'."""

from typing import Literal

from pydantic import Field

from ftjax.config.base import Section

Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"]


class GroupConfig(Section):
    """Settings for the parameters whose path matches `pattern` (a regex over the Hugging Face name; the first match wins)."""

    pattern: str = Field(description="regex that is searched for in Hugging Face's parameter names")
    learning_rate: float | None = Field(None, ge=0, description="of these parameters; null: optimizer.learning_rate")
    weight_decay: float | None = Field(None, ge=0, description="of these parameters; null: optimizer.weight_decay")
    freeze: bool = Field(False, description="do not train these parameters")


class OptimizerConfig(Section):
    """The optimizer, its learning rate over the run, and parameter groups."""

    name: Literal["adamw", "adafactor"] = Field("adamw", description="adafactor keeps less state than adamw")
    learning_rate: float = Field(2e-4, ge=0, description="the highest of the schedule")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, of matrices only")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's mean of the gradients")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's mean of their squares")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to AdamW's divisor")
    max_grad_norm: float | None = Field(1.0, gt=0, description="null: no clipping")
    lr_scheduler_type: Schedule = Field("cosine", description="course of the learning rate after the warm-up")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of the steps in which the learning rate rises from 0")
    warmup_steps: int | None = Field(None, ge=0, description="takes precedence over warmup_ratio")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="share of the steps used by the decay of warmup_stable_decay")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate over peak")
    loraplus_lr_ratio: float | None = Field(None, gt=0, description="learning rate of lora_B over lora_A (arXiv:2402.12354)")
    state_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="storage dtype of AdamW's moments, with stochastic rounding; updates compute in float32"
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="storage dtype of trained weights; bfloat16 takes half the memory and rounds updates stochastically",
    )
    offload: bool = Field(False, description="keep the moments in host memory between updates")
    groups: list[GroupConfig] = Field(
        default_factory=list, description="settings of parameters by name; the first pattern that matches wins"
    )
