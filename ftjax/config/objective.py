"""`objective:` -- the training loss."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ftjax.config.base import Section
from ftjax.config.distill import DistillConfig
from ftjax.config.preference import CpoConfig, DpoConfig, KtoConfig, OrpoConfig, RewardConfig, SimpoConfig
from ftjax.config.rewards import GrpoConfig, RlooConfig


class SftConfig(Section):
    """Next-token cross-entropy on the trained tokens."""

    name: Literal["sft"] = "sft"
    loss_chunk: int = Field(512, ge=1, description="tokens whose logits are in memory at a time, per device")


ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]  # names in transformers


class ClassificationConfig(Section):
    """Each row is a text and its class, its labels (any number of them), or numbers.

    The words of a class are trained as an answer, or a head over the classes; labels and numbers always have a head.
    """

    name: Literal["classification"] = "classification"
    problem_type: ProblemType = Field(
        "single_label_classification", description="one class per row, several labels, or numbers"
    )
    head: bool = Field(
        False, description="a classification head, in the layout of AutoModelForSequenceClassification; the last two have one"
    )
    labels: list[str] | None = Field(None, description="the classes, labels or outputs, by index; null: those of data.train")
    label_format: Literal["auto", "names", "ids", "multi_hot"] = Field(
        "auto", description="multi_label_classification: a row's labels are a list of names, of numbers, or of 0 and 1 for each"
    )
    label_separator: str | None = Field(
        None, min_length=1, description="separator of labels (or numbers) in one text: ',' for 'joy, love'"
    )
    loss_chunk: int = Field(512, ge=1, description="tokens whose logits are in memory at a time, per device")

    @property
    def single(self) -> bool:
        """Whether each row has one class."""
        return self.problem_type == "single_label_classification"

    @model_validator(mode="after")
    def _differ(self) -> "ClassificationConfig":
        least = 2 if self.single else 1
        if self.labels is not None and (len(self.labels) < least or len(set(self.labels)) < len(self.labels)):
            found = "two classes" if self.single else "one label"
            raise ValueError(f"labels {self.labels}: a {self.problem_type} has {found} at least, each named once")
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> "ClassificationConfig":
        if not self.single and not self.head:
            if "head" in self.model_fields_set:
                raise ValueError(f"head: false trains the words of one class; problem_type {self.problem_type} needs a head")
            object.__setattr__(self, "head", True)
        if self.label_format != "auto" and self.problem_type != "multi_label_classification":
            raise ValueError(f"label_format {self.label_format} goes with problem_type: multi_label_classification")
        if self.label_separator is not None and self.single:
            raise ValueError(
                f"label_separator {self.label_separator!r} divides several labels, and problem_type {self.problem_type} has "
                "one a row; set problem_type: multi_label_classification"
            )
        return self


ObjectiveConfig = Annotated[
    SftConfig
    | ClassificationConfig
    | DpoConfig
    | SimpoConfig
    | CpoConfig
    | OrpoConfig
    | KtoConfig
    | RewardConfig
    | GrpoConfig
    | RlooConfig
    | DistillConfig,
    Field(discriminator="name"),
]
