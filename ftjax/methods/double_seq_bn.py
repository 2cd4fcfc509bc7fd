"""Houlsby's adapter: a bottleneck after both sublayers of each block (arXiv:1902.00751)."""

from ftjax.config import DoubleSeqBnConfig
from ftjax.methods.bottleneck import Kind, make_method

METHOD = make_method("double_seq_bn", DoubleSeqBnConfig, Kind("result", ("attention_adapters", "output_adapters")))
