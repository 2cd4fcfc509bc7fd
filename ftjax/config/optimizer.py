"""`optimizer:` -- AdamW, its schedule and its parameter groups. Names are transformers' TrainingArguments'."""

from typing import Literal

from pydantic import Field

from ftjax.config.base import Section

Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"]


class GroupConfig(Section):
    """Settings for the parameters whose path matches `pattern` (a regex over the Hugging Face name; the first match wins)."""

    pattern: str
    learning_rate: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    freeze: bool = False


class OptimizerConfig(Section):
    name: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = Field(2e-4, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0, description="null: no clipping")
    lr_scheduler_type: Schedule = "cosine"
    warmup_ratio: float = Field(0.0, ge=0, le=1)
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
    groups: list[GroupConfig] = Field(default_factory=list)
