"""`method:` -- what trains. Names and defaults are PEFT's (peft 0.21)."""

from typing import Annotated, Literal

from pydantic import Field

from ftjax.config.base import Section


class FullConfig(Section):
    """The model's own weights train: all of them, or a part.

    `train` and `last_layers` add up; `freeze` takes away from what they name. Patterns are regexes that are searched for
    in Hugging Face's parameter names. `norms` (weights and biases of normalisations) and `biases` (of everything) are
    words: `train: [norms, biases]` is BitFit (Ben Zaken et al. 2022, arXiv:2106.10199) with norms.
    """

    name: Literal["full"] = "full"
    train: list[str] | None = Field(None, description="patterns, `norms` or `biases`: what trains; null: everything")
    freeze: list[str] = Field(default_factory=list, description="patterns, `norms` or `biases`: what does not")
    last_layers: int | None = Field(None, ge=1, description="train the last so many layers, and else only what `train` names")

    @property
    def partial(self) -> bool:
        return bool(self.train is not None or self.freeze or self.last_layers)


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
