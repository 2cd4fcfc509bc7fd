"""The configuration of a run: one strict schema, one section a file."""

from ftjax.config.base import Section
from ftjax.config.data import DataConfig
from ftjax.config.evaluate import EvaluateConfig
from ftjax.config.method import FullConfig, LoraConfig, MethodConfig
from ftjax.config.model import ModelConfig
from ftjax.config.objective import ObjectiveConfig, SftConfig
from ftjax.config.optimizer import GroupConfig, OptimizerConfig
from ftjax.config.training import MeshConfig, TrainingConfig

__all__ = [
    "Config", "DataConfig", "EvaluateConfig", "FullConfig", "GroupConfig", "LoraConfig", "MeshConfig", "MethodConfig",
    "ModelConfig", "ObjectiveConfig", "OptimizerConfig", "Section", "SftConfig", "TrainingConfig",
]  # fmt: skip


class Config(Section):
    """Everything that defines a run."""

    model: ModelConfig
    method: MethodConfig = LoraConfig()
    data: DataConfig
    objective: ObjectiveConfig = SftConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()
    output_dir: str = "runs/default"
