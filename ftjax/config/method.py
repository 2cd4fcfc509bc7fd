"""`method:` -- the fine-tuning method. Names and defaults are PEFT's (peft 0.21)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ftjax.config.base import Section

NITER = r"^pissa_niter_[1-9]\d*$"
REDUCTION = "size of the hidden states over that of the bottleneck"
NON_LINEARITY = "activation in the bottleneck, such as relu, gelu or swish"


class FullConfig(Section):
    """Trains the model's own weights: all of them, or a part.

    `train` and `last_layers` add up; `freeze` is subtracted from them. Patterns are regexes that are searched for in
    Hugging Face's parameter names. `norms` (weights and biases of normalisations) and `biases` (all biases) are keywords:
    `train: [norms, biases]` is BitFit (Ben Zaken et al. 2022, arXiv:2106.10199) with norms.
    """

    name: Literal["full"] = "full"
    train: list[str] | None = Field(None, description="patterns, `norms` or `biases`: what is trained; null: everything")
    freeze: list[str] = Field(default_factory=list, description="patterns, `norms` or `biases`: what is frozen")
    last_layers: int | None = Field(
        None, ge=1, description="train this many last layers, and otherwise only what `train` names"
    )

    @property
    def partial(self) -> bool:
        return bool(self.train is not None or self.freeze or self.last_layers)


class LoraConfig(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    name: Literal["lora"] = "lora"
    r: int = Field(8, ge=1, description="rank of the update")
    lora_alpha: float = Field(8, gt=0, description="the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of the inputs of lora_A that are dropped")
    target_modules: str | list[str] = Field(
        "all-linear", description="`all-linear`, a list of module names, or a regex that matches whole module paths"
    )
    exclude_modules: str | list[str] | None = Field(None, description="modules that are left out, named as in target_modules")
    target_parameters: list[str] = Field(
        default_factory=list,
        description="weights of routed experts to adapt: [mlp.experts.gate_up_proj, mlp.experts.down_proj]",
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) (arXiv:2312.03732)")
    use_dora: bool = Field(False, description="train each output's magnitude separately from its direction (arXiv:2402.09353)")
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "pissa"] | Annotated[str, Field(pattern=NITER)] = Field(
        True,
        description="true: A uniform, B zero; gaussian: A normal with deviation 1/r, B zero; orthogonal: both, with BA = 0; "
        "pissa: the largest singular values of the weight; pissa_niter_16: these by 16 subspace iterations",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases of the base model to train too: all, or those of the adapted layers"
    )
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="other ranks, by module: {q_proj: 16}")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="other alphas, by module")
    layers_to_transform: list[int] | int | None = Field(None, description="layers to adapt, counted from 0; null: all")
    layers_pattern: list[str] | str | None = Field(
        None, description="name of the layer list that `layers_to_transform` indexes; null: any"
    )
    modules_to_save: list[str] = Field(default_factory=list, description="modules that are trained and saved as a whole")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = Field(
        None,
        description="tokens whose embedding rows are trained; per module: {embed_tokens: [..], lm_head: [..]}",
    )
    ensure_weight_tying: bool = Field(
        False, description="if the model ties its output to its embedding, keep trained embeddings tied too"
    )
    adapter_path: str | None = Field(None, description="start from this PEFT folder, or a run's; its settings replace these")

    @property
    def pissa(self) -> bool:
        return str(self.init_lora_weights).startswith("pissa")

    def conflicts(self, quantization: str | None = None) -> list[str]:
        """Return what is inconsistent in these options for any model; each entry says what to do.

        Args:
            quantization: of the base model.
        """
        problems = []
        regex = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if self.layers_to_transform is not None and regex:
            problems.append("method.layers_to_transform needs target_modules as a list (PEFT refuses it beside a regex)")
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("method.layers_pattern needs layers_to_transform (PEFT refuses it alone); set it or leave both out")
        if self.pissa and self.use_dora:
            problems.append(
                "method.init_lora_weights: pissa is exported as an update of twice the rank, and method.use_dora: true scales "
                "the sum of weight and update; leave one of them out"
            )
        if self.pissa and quantization:
            problems.append(
                f"method.init_lora_weights: pissa with model.quantization: {quantization} would have to round what is left of "
                "the weight without its largest singular values, and the base model is rounded here; leave one of them out"
            )
        return problems


class BottleneckConfig(Section):
    """Settings shared by the bottleneck adapters; names and defaults are those of the `adapters` library (1.3)."""

    name: str
    reduction_factor: float = Field(gt=0, description=REDUCTION)
    non_linearity: str = Field(description=NON_LINEARITY)
    scaling: float = Field(1.0, description="factor on the output of the adapter")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of the inputs of the adapter that are dropped")
    adapter_name: str = Field("default", pattern=r"^\w+$", description="name of the adapter in the file")
    adapter_path: str | None = Field(None, description="start from this folder, or a run's; its settings replace these")


class SeqBnConfig(BottleneckConfig):
    """A bottleneck after each feed-forward layer (Pfeiffer et al. 2020, arXiv:2005.00247)."""

    name: Literal["seq_bn"] = "seq_bn"
    reduction_factor: float = Field(16, gt=0, description=REDUCTION)
    non_linearity: str = Field("relu", description=NON_LINEARITY)


class DoubleSeqBnConfig(BottleneckConfig):
    """Bottlenecks after attention and feed-forward layers (Houlsby et al. 2019, arXiv:1902.00751)."""

    name: Literal["double_seq_bn"] = "double_seq_bn"
    reduction_factor: float = Field(16, gt=0, description=REDUCTION)
    non_linearity: str = Field("swish", description=NON_LINEARITY)


class ParBnConfig(BottleneckConfig):
    """A bottleneck beside each feed-forward layer (He et al. 2021, arXiv:2110.04366)."""

    name: Literal["par_bn"] = "par_bn"
    reduction_factor: float = Field(2, gt=0, description=REDUCTION)
    non_linearity: str = Field("relu", description=NON_LINEARITY)
    scaling: float = Field(4.0, description="factor on the output of the adapter")


class IA3Config(Section):
    """Learned factors on activations (Liu et al. 2022, arXiv:2205.05638)."""

    name: Literal["ia3"] = "ia3"
    target_modules: str | list[str] | None = Field(
        None, description="as for LoRA; null: keys, values and the second feed-forward layer, as in the paper"
    )
    exclude_modules: str | list[str] | None = Field(None, description="modules that are left out, named as in target_modules")
    feedforward_modules: str | list[str] | None = Field(
        None, description="targets whose input is scaled; null: second feed-forward layers"
    )
    modules_to_save: list[str] = Field(default_factory=list, description="modules that are trained and saved as a whole")
    adapter_path: str | None = Field(None, description="start from this PEFT folder, or a run's; its settings replace these")


class PrefixTuningConfig(Section):
    """Learned keys and values before every text, in every layer (Li and Liang 2021, arXiv:2101.00190)."""

    name: Literal["prefix_tuning"] = "prefix_tuning"
    num_virtual_tokens: int = Field(20, ge=1, description="how many are put before every text")
    prefix_projection: bool = Field(False, description="compute them with a two-layer MLP during training")
    encoder_hidden_size: int | None = Field(None, ge=1, description="of that MLP; null: kv heads times head size")
    init_weights: Literal["zero"] | None = Field(None, description="`zero`: the (projected) prefix starts at zero")
    adapter_path: str | None = Field(None, description="start from this PEFT folder, or a run's; its settings replace these")

    @model_validator(mode="after")
    def _hidden_needs_projection(self) -> "PrefixTuningConfig":
        if self.encoder_hidden_size and not self.prefix_projection:
            raise ValueError("method.encoder_hidden_size is of the MLP that prefix_projection: true asks for; it has no effect")
        return self


class PromptTuningConfig(Section):
    """Learned embeddings before every text (Lester et al. 2021, arXiv:2104.08691)."""

    name: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: int = Field(20, ge=1, description="how many are put before every text")
    prompt_tuning_init: Literal["RANDOM", "TEXT", "SAMPLE_VOCAB"] = Field(
        "RANDOM", description="start from random numbers, from the embeddings of a text, or from those of random tokens"
    )
    prompt_tuning_init_text: str | None = Field(None, description="with TEXT: initial text of the embeddings")
    adapter_path: str | None = Field(None, description="start from this PEFT folder, or a run's; its settings replace these")

    @model_validator(mode="after")
    def _text_for_text(self) -> "PromptTuningConfig":
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise ValueError("prompt_tuning_init: TEXT and prompt_tuning_init_text belong together; set both or neither")
        return self


class PTuningConfig(Section):
    """Learned embeddings before every text, computed by an MLP during training (Liu et al. 2021, arXiv:2103.10385)."""

    name: Literal["p_tuning"] = "p_tuning"
    num_virtual_tokens: int = Field(20, ge=1, description="how many are put before every text")
    encoder_hidden_size: int | None = Field(None, ge=1, description="of the MLP; null: the model's width")
    adapter_path: str | None = Field(None, description="start from this PEFT folder, or a run's; its settings replace these")


MethodConfig = Annotated[
    FullConfig | LoraConfig | SeqBnConfig | DoubleSeqBnConfig | ParBnConfig
    | IA3Config | PrefixTuningConfig | PromptTuningConfig | PTuningConfig,
    Field(discriminator="name"),
]  # fmt: skip
