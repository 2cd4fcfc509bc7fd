"""`evaluate:` -- settings of `ftjax evaluate` and of evaluation during training."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ftjax.config.base import Section
from ftjax.config.data import SourceConfig

TASKS = (
    "loss", "exact_match", "numeric_answer", "f1", "bleu", "chrf", "rouge", "classification", "regression", "preference",
    "json_match", "code",
)  # fmt: skip


class LmEvalConfig(Section):
    """`ftjax evaluate --lm-eval`: tasks of lm-evaluation-harness, under its own names."""

    tasks: list[str] = Field(default_factory=list, description="names, groups, or .yaml files of tasks")
    include_path: str | None = Field(None, description="a folder with more tasks")
    num_fewshot: int | None = Field(None, ge=0, description="null: as each task says")
    apply_chat_template: bool = Field(False, description="ask in the chat template's form")
    fewshot_as_multiturn: bool = Field(True, description="with the chat template: each example is a separate turn")
    system_instruction: str | None = Field(None, description="a system message, or text before each prompt")


class EvaluateConfig(Section):
    """Task, data and decoding of an evaluation."""

    task: str = Field("loss", description=f"{', '.join(TASKS)}, or a Python file with one function")
    data: str | SourceConfig | None = Field(None, description="evaluation data; null: data.validation")
    limit: int | None = Field(None, ge=1, description="at most this many rows, evenly spread over the data; null: all")
    max_new_tokens: int = Field(256, ge=1, description="length limit of an answer, in tokens")
    temperature: float = Field(0.0, ge=0, description="0: greedy decoding")
    top_k: int | None = Field(None, ge=1, description="sample from so many tokens; null: all")
    top_p: float | None = Field(None, gt=0, le=1, description="sample from the likeliest tokens of this total probability")
    min_p: float | None = Field(
        None, ge=0, le=1, description="sample from tokens at least so likely, relative to the likeliest"
    )
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens that already occurred become less likely")
    stop: list[str] = Field(default_factory=list, description="strings that end an answer and are not part of it")
    num_samples: int = Field(1, ge=1, description="answers per prompt, for pass@k")
    batch_size: int = Field(32, ge=1, description="prompts per batch")
    seed: int = Field(0, description="for sampling and resampling")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: float32 on CPUs")
    normalize: bool = Field(True, description="exact_match ignores case, punctuation, articles and white space")
    labels: list[str] | None = Field(None, description="classification: the classes; null: those that occur in the data")
    threshold: float | dict[str, float] = Field(
        0.5, description="for several labels per row: the minimum probability of a label, or {label: probability}"
    )
    rouge_types: list[Literal["rouge1", "rouge2", "rouge3", "rouge4", "rougeL", "rougeLsum"]] = Field(
        default_factory=lambda: ["rouge1", "rouge2", "rougeL"], description="which of the scores task rouge computes"
    )
    rouge_stemmer: bool = Field(False, description="compare words by their stems")
    fields: list[str] | None = Field(None, description="json_match: the fields that count; null: those of the references")
    pass_at_k: list[int] = Field(default_factory=lambda: [1], description="code: each at most num_samples")
    code_timeout: float = Field(10.0, gt=0, description="code: seconds that one program may run")
    code_memory: int = Field(1024, ge=64, description="code: MiB that one program, and each process that it starts, may take")
    code_processes: int = Field(32, ge=1, description="code: concurrent processes of one program")
    lm_eval: LmEvalConfig = Field(default_factory=LmEvalConfig, description="settings of lm-evaluation-harness")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    resamples: int = Field(1000, ge=100, description="for the bootstrap and the paired test")
    training_rows: int | None = Field(
        None, ge=1, description="rows on which every evaluation during training measures `task`; null: none"
    )
    training_prompts: list[str] = Field(default_factory=list, description="prompts that every evaluation answers")
    training_examples: int = Field(2, ge=0, description="rows of the validation data that every evaluation answers")
    training_max_new_tokens: int = Field(64, ge=1, description="length limit of those answers")

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS and not task.endswith(".py"):
            raise ValueError(f"found {task!r}; known: {', '.join(TASKS)}, or the path of a Python file (.py) with one function")
        return task

    @field_validator("threshold")
    @classmethod
    def _probabilities(cls, given: float | dict[str, float]) -> float | dict[str, float]:
        for value in given.values() if isinstance(given, dict) else (given,):
            if not 0 < value < 1:
                raise ValueError(f"{value:g} is not a probability between 0 and 1")
        return given

    @model_validator(mode="after")
    def _agrees(self) -> "EvaluateConfig":
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples {self.num_samples} with temperature 0 gives equal answers; set temperature")
        if not self.pass_at_k or min(self.pass_at_k) < 1 or max(self.pass_at_k) > self.num_samples:
            raise ValueError(f"pass_at_k {self.pass_at_k} must be between 1 and num_samples {self.num_samples}")
        if self.labels is not None and len(set(self.labels)) < 2:
            raise ValueError(f"labels {self.labels}: a classification has at least two classes")
        return self
