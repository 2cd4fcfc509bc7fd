"""`objective:` -- the loss that is minimised."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ftjax.config.base import Section


class SftConfig(Section):
    """Next-token cross-entropy on the trained tokens."""

    name: Literal["sft"] = "sft"
    loss_chunk: int = Field(512, ge=1, description="tokens whose logits exist at one time, on each device")

    @property
    def classes(self) -> None:
        """Of a classification head: there is none."""
        return None


class ClassificationConfig(Section):
    """Each row is a text and its class. The words of the labels are trained as an answer, or a head over the classes."""

    name: Literal["classification"] = "classification"
    head: bool = Field(False, description="a classification head, in the layout of AutoModelForSequenceClassification")
    labels: list[str] | None = Field(None, description="the classes, in the order of their numbers; null: those of data.train")
    loss_chunk: int = Field(512, ge=1, description="tokens whose logits exist at one time, on each device")

    @property
    def classes(self) -> list[str] | None:
        """Of the classification head; None without one."""
        return self.labels if self.head else None

    @model_validator(mode="after")
    def _differ(self) -> "ClassificationConfig":
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"labels {self.labels}: a classification has two classes at least, each named once")
        return self


ObjectiveConfig = Annotated[SftConfig | ClassificationConfig, Field(discriminator="name")]
