"""The parallel adapter: a bottleneck beside each feed-forward layer (He et al. 2021, arXiv:2110.04366)."""

from ftjax.config import ParBnConfig
from ftjax.methods.bottleneck import Kind, make_method

METHOD = make_method("par_bn", ParBnConfig, Kind("stream", ("output_adapters",), zeros=True))
