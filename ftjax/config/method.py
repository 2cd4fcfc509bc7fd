"""`method:` -- what trains. Names and defaults are PEFT's (peft 0.21)."""

from typing import Annotated, Literal

from pydantic import Field

from ftjax.config.base import Section


class FullConfig(Section):
    """Full fine-tuning: every weight trains."""

    name: Literal["full"] = "full"


class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    name: Literal["lora"] = "lora"
    r: int = Field(8, ge=1)
    lora_alpha: float = Field(8, gt=0)
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: str | list[str] = Field(
        "all-linear", description="`all-linear`, a list of module names, or a regex that matches whole module paths"
    )
    exclude_modules: str | list[str] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] = Field(default_factory=list)
    adapter_path: str | None = Field(None, description="start from this PEFT folder; its settings replace the ones above")


MethodConfig = Annotated[FullConfig | LoraConfig, Field(discriminator="name")]
