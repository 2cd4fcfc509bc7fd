"""`model:` -- which base model, in which precision, run how."""

from typing import Literal

from pydantic import Field

from ftjax.config.base import Section

DType = Literal["bfloat16", "float16", "float32"]
Attention = Literal["auto", "xla", "blockwise", "splash", "cudnn"]
Remat = Literal["auto", "none", "dots", "full"]


class ModelConfig(Section):
    """The base model.

    `dtype` is how frozen weights are stored; what trains is always kept in float32.
    `compute_dtype` is the dtype of activations and matrix products; reductions stay float32.
    """

    path: str = Field(description="Hub id, local folder in Hugging Face layout, or a .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    tokenizer: str | None = Field(None, description="tokenizer folder or Hub id, where it is not the model's own")
    chat_template: str | None = Field(None, description="a Jinja template or the path of a .jinja file")
    dtype: DType = "bfloat16"
    compute_dtype: DType = "bfloat16"
    attention: Attention = "auto"
    remat: Remat = "auto"
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="hold the frozen weights of dense layers in 8 or 4 bits (QLoRA); null: in `dtype`"
    )
