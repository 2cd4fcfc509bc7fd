"""`model:` -- the base model, its precision and its execution."""

from typing import Literal

from pydantic import Field

from ftjax.config.base import Section

DType = Literal["bfloat16", "float16", "float32"]
Attention = Literal["auto", "xla", "blockwise", "splash", "cudnn"]
Remat = Literal["auto", "none", "dots", "attention", "full", "offload"]


class ModelConfig(Section):
    """The base model.

    `dtype` is the storage dtype of frozen weights; trained weights are always kept in float32. `compute_dtype` is the dtype
    of activations and matrix products; reductions stay float32.
    """

    path: str = Field(description="Hub id, local folder in Hugging Face layout, or a .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    tokenizer: str | None = Field(None, description="tokenizer folder or Hub id, if not the model's own")
    chat_template: str | None = Field(None, description="a Jinja template or the path of a .jinja file")
    add_tokens: list[str] = Field(default_factory=list, description="words that become one token each, with an embedding")
    add_special_tokens: list[str] = Field(
        default_factory=list, description="the same, for markers that are removed from generated text"
    )
    pad_vocab_to_multiple_of: int | None = Field(
        None, ge=1, description="for the embedding's rows, if mesh.tensor does not divide them"
    )
    dtype: DType = Field("bfloat16", description="in which frozen weights are stored; trained ones are float32")
    compute_dtype: DType = Field("bfloat16", description="of activations and matrix products; on CPUs float32 is faster")
    attention: Attention = Field("auto", description="auto: the fastest kernel that device and model allow")
    remat: Remat = Field(
        "auto", description="what is recomputed in the backward pass, from none to full (least memory); auto: as little as fits"
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="store the frozen weights of dense layers in 8 or 4 bits (QLoRA); null: in `dtype`"
    )

    @property
    def adds_tokens(self) -> bool:
        return bool(self.add_tokens or self.add_special_tokens)
