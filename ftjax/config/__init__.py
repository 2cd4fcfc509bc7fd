"""The configuration of a run: a strict schema with one section per file."""

from pydantic import Field, PrivateAttr, model_validator

from ftjax.config.base import Section
from ftjax.config.check import CheckConfig
from ftjax.config.data import DataConfig
from ftjax.config.distill import DistillConfig
from ftjax.config.evaluate import EvaluateConfig
from ftjax.config.method import (
    BottleneckConfig,
    DoubleSeqBnConfig,
    FullConfig,
    IA3Config,
    LoraConfig,
    MethodConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SeqBnConfig,
)
from ftjax.config.model import ModelConfig
from ftjax.config.objective import ClassificationConfig, ObjectiveConfig, SftConfig
from ftjax.config.optimizer import GroupConfig, OptimizerConfig
from ftjax.config.preference import PAIRWISE
from ftjax.config.rewards import GrpoConfig, Rollouts
from ftjax.config.training import MeshConfig, TrainingConfig
from ftjax.errors import join_problems

__all__ = [
    "BottleneckConfig", "CheckConfig", "ClassificationConfig", "Config", "DataConfig", "DoubleSeqBnConfig",
    "EvaluateConfig", "FullConfig", "GroupConfig", "IA3Config", "LoraConfig", "MeshConfig", "MethodConfig", "ModelConfig",
    "ObjectiveConfig", "OptimizerConfig", "PTuningConfig", "ParBnConfig", "PrefixTuningConfig", "PromptTuningConfig",
    "Section", "SeqBnConfig", "SftConfig", "TrainingConfig",
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
    check: CheckConfig = CheckConfig()
    mesh: MeshConfig = MeshConfig()
    output_dir: str = Field("runs/default", description="folder of the run; an unfinished run there is resumed")
    _unasked: frozenset[str] = PrivateAttr(frozenset())

    @property
    def unasked(self) -> frozenset[str]:
        """Dotted keys of `ftjax.config.code` that only the run's folder set, not the user."""
        return self._unasked

    @model_validator(mode="after")
    def _classification(self) -> "Config":
        """Check a classification, and evaluate it by its classes unless another task is set."""
        if self.objective.name != "classification":
            return self
        if self.data.streaming:
            raise ValueError("objective classification looks for the labels of all rows first, which data.streaming does not")
        if self.objective.head and self.method.name not in ("full", "lora"):
            raise ValueError(f"objective.head trains with method full or lora, not {self.method.name}; leave head out")
        given, evaluate = {}, self.evaluate
        if "task" not in evaluate.model_fields_set:
            given["task"] = "regression" if self.objective.problem_type == "regression" else "classification"
        if evaluate.labels is None and self.objective.single:
            given["labels"] = self.objective.labels
        object.__setattr__(self, "evaluate", evaluate.model_copy(update=given))
        return self

    @model_validator(mode="after")
    def _pairs(self) -> "Config":
        """Evaluate objectives that compare two answers by their pairs unless another task is set."""
        if self.objective.name not in PAIRWISE:
            return self
        if self.objective.name == "reward" and self.method.name not in ("full", "lora"):
            raise ValueError(f"objective reward trains a head with method full or lora, not {self.method.name}")
        if getattr(self.objective, "sync_ref_model", False) and self.method.name != "full":
            raise ValueError(
                f"objective.sync_ref_model moves a copy of all weights, and method {self.method.name} compares with the base "
                "model itself; use method full, or leave it out"
            )
        if "task" not in self.evaluate.model_fields_set:
            object.__setattr__(self, "evaluate", self.evaluate.model_copy(update={"task": "preference"}))
        return self

    @model_validator(mode="after")
    def _rollouts(self) -> "Config":
        """Check an objective that generates answers; its best checkpoint is that of the highest reward by default."""
        objective, options = self.objective, self.training
        if not isinstance(objective, Rollouts):
            return self
        problems = []
        if options.global_batch_size % objective.num_generations:
            problems.append(
                f"training.global_batch_size counts answers: {options.global_batch_size} is not a multiple of "
                f"objective.num_generations {objective.num_generations}"
            )
        if self.data.max_length <= objective.max_completion_length:
            problems.append(
                f"data.max_length {self.data.max_length} must hold prompt and answer, and objective.max_completion_length is "
                f"{objective.max_completion_length}; raise the first or lower the second"
            )
        if self.data.streaming:
            problems.append("data.streaming: prompts are drawn from the whole set; leave it out")
        if problems:
            raise ValueError(join_problems(problems, f"objective {objective.name}"))
        if "metric_for_best_model" not in options.model_fields_set:
            options = options.model_copy(update={"metric_for_best_model": "eval/reward"})
            object.__setattr__(self, "training", options)
        return self

    @model_validator(mode="after")
    def _apart(self) -> "Config":
        """Check that answers can be generated with earlier parameters than those in training."""
        count, objective, problem = self.mesh.rollout_devices, self.objective, None
        if not count:
            return self
        if not isinstance(objective, GrpoConfig):
            problem = f"answers would be an update behind, for which objective grpo has a correction, and not {objective.name}"
        elif objective.importance_sampling_correction is None:
            problem = (
                "answers are an update behind, which needs a correction: set objective.importance_sampling_correction: "
                "token_truncate (or another)"
            )
        elif objective.num_iterations > 1:
            problem = (
                f"answers are an update behind already when objective.num_iterations {objective.num_iterations} uses them "
                "again; set it to 1"
            )
        elif self.mesh.slices > 1:
            problem = f"{count} devices of one slice would generate for {self.mesh.slices}; set mesh.slices: 1"
        if problem is not None:
            raise ValueError(
                f"mesh.rollout_devices: {problem}. Or leave mesh.rollout_devices out: all devices then do both, in turn"
            )
        return self

    @model_validator(mode="after")
    def _distillation(self) -> "Config":
        """Check that a distillation can have its answers, or its teacher's predictions, at hand."""
        objective = self.objective
        if not isinstance(objective, DistillConfig):
            return self
        problems = []
        if self.data.streaming and (objective.on_policy or objective.teacher_logprobs is not None):
            what = (
                "lmbda above 0 draws documents" if objective.on_policy else "teacher_logprobs has predictions for the documents"
            )
            problems.append(f"data.streaming: objective.{what} of the whole set; leave it out")
        elif self.data.streaming and objective.use_uld_loss:
            problems.append("data.streaming: objective.use_uld_loss aligns two tokenisations of a whole set; leave it out")
        if objective.use_uld_loss and self.data.truncation in ("left", "middle", "split"):
            problems.append(
                f"data.truncation: {self.data.truncation}: objective.use_uld_loss aligns two texts from their beginning; "
                "choose drop, right or error"
            )
        if objective.lmbda == 1 and self.data.max_length <= objective.max_completion_length:
            problems.append(
                f"data.max_length {self.data.max_length} must hold prompt and answer, and objective.max_completion_length is "
                f"{objective.max_completion_length}; raise the first or lower the second"
            )
        if problems:
            raise ValueError(join_problems(problems, "objective distill"))
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> "Config":
        """Check that the method's options fit each other and the base model; report all that do not."""
        problems, quantization = [], self.model.quantization
        if self.method.name == "lora":
            problems = self.method.conflicts(quantization)
        elif self.method.name == "full" and quantization:
            problems.append(
                f"model.quantization: {quantization} is for weights that stay as they are, and method full trains them; use an "
                "adapter (method.name: lora), or leave model.quantization out"
            )
        if problems:
            raise ValueError(join_problems(problems, "method"))
        return self
