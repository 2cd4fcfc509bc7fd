"""Full fine-tuning: every weight of the base model trains, as float32 masters."""

from flax import nnx

from ftjax.config import FullConfig
from ftjax.methods.method import Method
from ftjax.methods.save import train
from ftjax.models.param import variables


def attach(root: nnx.Module, config: FullConfig) -> None:
    """Mark every parameter as trained, in place."""
    for _, variable in variables(root):
        if isinstance(variable, nnx.Param):
            train(variable)


METHOD = Method(FullConfig, attach, adapter=False)
