"""Pfeiffer's adapter: one bottleneck after each feed-forward layer (arXiv:2005.00247)."""

from ftjax.config import SeqBnConfig
from ftjax.methods.bottleneck import Kind, make_method

METHOD = make_method("seq_bn", SeqBnConfig, Kind("sum", ("output_adapters",)))
