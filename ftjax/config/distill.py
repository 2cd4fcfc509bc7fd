"""`objective: {name: distill}` -- learning from a teacher; names and defaults are those of TRL's `DistillationConfig`.

`lmbda` is that of its `GKDConfig`; `use_uld_loss` and what begins with `uld_` are of its `GOLDConfig`, and so are the two
weights, without the prefix `uld_`.
"""

from typing import Literal

from pydantic import Field, model_validator

from ftjax.config.preference import LOSS_CHUNK, without_effect
from ftjax.config.rewards import Sampled


class DistillConfig(Sampled):
    """Distillation: the model learns to predict the tokens that a teacher predicts."""

    name: Literal["distill"] = "distill"
    teacher_model_name_or_path: str | None = Field(
        None, min_length=1, description="the teacher: a Hub id, a model's folder, a .gguf file, a run or a PEFT folder"
    )
    teacher_model_revision: str | None = Field(None, description="branch, tag or commit of a teacher on the Hub")
    teacher_model_server_url: str | None = Field(
        None, min_length=1, description="ftjax teach: ask this server with OpenAI's interface, such as http://host:8000/v1"
    )
    teacher_logprobs: str | None = Field(
        None, min_length=1, description="folder in which `ftjax teach` writes; training then reads it instead of the teacher"
    )
    loss_top_k: int = Field(
        64, ge=1, description="teacher_logprobs: most likely tokens of the teacher that are kept; the others are one outcome"
    )
    beta: float = Field(
        1.0, ge=0, le=1, description="0: forward KL divergence, 1: reverse, between: generalised Jensen-Shannon divergence"
    )
    lmbda: float = Field(0.5, ge=0, le=1, description="share of rows that the model answers itself; 0: the answers of the data")
    distillation_weight: float = Field(1.0, ge=0, description="factor on the divergence")
    crossentropy_weight: float = Field(0.0, ge=0, description="factor on the cross-entropy of the data's answers")
    use_uld_loss: bool = Field(
        False, description="the teacher has another tokenizer: compare what tokens of both say of the same piece of text (ULD)"
    )
    uld_use_hybrid_loss: bool = Field(
        False, description="use_uld_loss: tokens of both vocabularies by the divergence, the others by sorted probabilities"
    )
    uld_hybrid_matched_weight: float | None = Field(
        None, ge=0, description="factor on that divergence; null: the share of the teacher's vocabulary that the student has"
    )
    uld_hybrid_unmatched_weight: float | None = Field(
        None, ge=0, description="factor on the distance of the others; null: one minus that share"
    )
    max_completion_length: int = Field(512, ge=1, description="lmbda above 0: maximum tokens of an answer")
    loss_chunk: int = Field(512, ge=1, description=LOSS_CHUNK)

    @property
    def on_policy(self) -> bool:
        """Whether some answers are generated."""
        return self.lmbda > 0

    @property
    def mixed(self) -> bool:
        """Whether a batch has answers of both kinds."""
        return 0 < self.lmbda < 1

    @model_validator(mode="after")
    def _fits(self) -> "DistillConfig":
        if self.teacher_model_name_or_path is None and self.teacher_logprobs is None:
            raise ValueError(
                "distill needs a teacher: write objective.teacher_model_name_or_path, or objective.teacher_logprobs, a folder "
                "that ftjax teach has written"
            )
        if self.teacher_logprobs is not None and self.lmbda:
            if "lmbda" in self.model_fields_set:
                raise ValueError(
                    f"lmbda {self.lmbda}: answers that are generated while training need the teacher itself, and "
                    "teacher_logprobs has its predictions for the data; set lmbda: 0, or leave teacher_logprobs out"
                )
            object.__setattr__(self, "lmbda", 0.0)
        if self.teacher_model_server_url is not None and (self.teacher_logprobs is None or self.temperature != 1):
            raise ValueError(
                "teacher_model_server_url: a server's predictions are written by ftjax teach, at temperature 1; set "
                "teacher_logprobs to a folder, and leave temperature out"
            )
        if not self.distillation_weight:
            raise ValueError("distillation_weight 0 does not use the teacher; write objective: {name: sft}")
        if self.use_uld_loss and self.teacher_logprobs is not None:
            raise ValueError(
                "use_uld_loss compares whole distributions, and teacher_logprobs has the likeliest tokens of a teacher with "
                "the same tokenizer; leave one of them out"
            )
        if (self.uld_hybrid_matched_weight is None) != (self.uld_hybrid_unmatched_weight is None):
            raise ValueError(
                f"uld_hybrid_matched_weight {self.uld_hybrid_matched_weight} and uld_hybrid_unmatched_weight "
                f"{self.uld_hybrid_unmatched_weight}: set both or neither"
            )
        hybrid = self.use_uld_loss and self.uld_use_hybrid_loss
        without_effect(self, {
            "uld_use_hybrid_loss": (self.use_uld_loss, "use_uld_loss"),
            "uld_hybrid_matched_weight": (hybrid, "use_uld_loss and uld_use_hybrid_loss"),
            "uld_hybrid_unmatched_weight": (hybrid, "use_uld_loss and uld_use_hybrid_loss"),
            "beta": (hybrid or not self.use_uld_loss, "uld_use_hybrid_loss (sorted probabilities have one distance)"),
            "crossentropy_weight": (self.lmbda < 1, "lmbda below 1 (generated answers are no examples)"),
            "loss_top_k": (self.teacher_logprobs is not None, "teacher_logprobs"),
            **{
                name: (self.on_policy, "lmbda above 0")
                for name in ("max_completion_length", "top_p", "top_k", "min_p", "repetition_penalty", "generation_batch_rows")
            },
        })  # fmt: skip
        return self
