"""`objective:` -- the loss that is minimised."""

from typing import Literal

from pydantic import Field

from ftjax.config.base import Section


class SftConfig(Section):
    """Next-token cross-entropy on the trained tokens."""

    name: Literal["sft"] = "sft"
    loss_chunk: int = Field(512, ge=1, description="tokens whose logits exist at one time, on each device")


ObjectiveConfig = SftConfig
