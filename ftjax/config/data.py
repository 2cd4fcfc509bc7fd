"""`data:` -- where the examples come from and how they become rows of tokens."""

from typing import Literal

from pydantic import Field

from ftjax.config.base import Section


class DataConfig(Section):
    """Training and validation data."""

    train: str
    validation: str | None = None
    format: str = "auto"
    columns: dict[str, str] = Field(default_factory=dict, description="ftjax's column name: the file's column name")
    max_length: int = Field(1024, ge=2)
    packing: bool = True
    truncation: Literal["right", "left", "drop", "error"] = "drop"
