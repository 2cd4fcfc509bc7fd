"""`training:` and `mesh:` -- duration, batch size, intervals and devices."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ftjax.config.base import Section


class TrainingConfig(Section):
    """`global_batch_size` counts rows over all devices for one optimizer update."""

    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data; 0.5: half of it")
    max_steps: int | None = Field(None, ge=1, description="takes precedence over num_train_epochs")
    global_batch_size: int = Field(8, ge=1, description="rows of one update, over all devices and microbatches")
    gradient_accumulation_steps: int = Field(1, ge=1, description="microbatches of one update; more of them take less memory")
    eval_steps: int | None = Field(None, ge=1, description="null: once, at the end, if there is validation data")
    eval_batch_size: int | None = Field(None, ge=1, description="null: the rows of one micro-batch")
    save_steps: int = Field(200, ge=1, description="updates between two checkpoints")
    save_total_limit: int = Field(2, ge=1, description="checkpoints that are kept, the newest ones")
    checkpoint_dir: str | None = Field(
        None, description="a folder that all hosts share, such as gs://bucket/run; null: checkpoints/ of output_dir"
    )
    allow_changed_data: bool = Field(False, description="resume from a checkpoint even if the documents changed since")
    logging_steps: int = Field(10, ge=1, description="updates between two logged rows")
    seed: int = Field(42, description="of the order of the data, new parameters, dropout and sampling")
    metric_for_best_model: str = Field("eval/loss", description="any metric of an evaluation, or the latest train/ one")
    greater_is_better: bool | None = Field(None, description="null: no for losses, errors and perplexity, yes for all others")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without improvement before the run stops")
    early_stopping_threshold: float = Field(0.0, ge=0, description="a smaller improvement counts as none")
    loss_spike_factor: float | None = Field(
        10.0, gt=1,
        description="skip an update whose loss is this many times further above the median of the latest 32 than their 90th "
        "percentile, and 3 nats above it at least; null: only on NaN or infinity",
    )  # fmt: skip
    max_skipped_updates: int = Field(5, ge=0, description="updates in a row that may be skipped before the run gives up")
    profile_steps: tuple[int, int] | None = Field(None, description="first and last update of a trace, in profile/ of the run")
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=lambda: ["tensorboard"], description="trackers that get the metrics, beside metrics.jsonl"
    )

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps and not 1 <= steps[0] <= steps[1]:
            raise ValueError(f"expected the first and the last step, from 1 on; found {list(steps)}")
        return steps

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_none(cls, value: Any) -> Any:
        """Accept TrainingArguments' `wandb` and `none` besides a list."""
        if value is None or value == "none":
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("metric_for_best_model")
    @classmethod
    def _as_written(cls, name: str) -> str:
        """Map TrainingArguments' `loss` and `eval_loss` to `eval/loss`, and names of an objective such as `rewards/margins`."""
        return name if name.startswith(("eval/", "train/")) else f"eval/{name.removeprefix('eval_')}"

    @property
    def best_is_greatest(self) -> bool:
        name = self.metric_for_best_model
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not (name.endswith(("loss", "perplexity", "/mse", "/mae", "/kl", "/rejected")) or "/loss/" in name)

    @model_validator(mode="after")
    def _divides(self) -> "TrainingConfig":
        if self.global_batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        return self


class MeshConfig(Section):
    """Devices along each axis; one of them may be -1, which takes the remaining devices. `mesh: auto` chooses all but
    slices."""

    data: int = Field(1, description="shards rows; replicates weights, across slices too")
    fsdp: int = Field(-1, description="shards rows, weights and optimizer state")
    expert: int = Field(1, description="shards rows, and the experts of a mixture of experts")
    tensor: int = Field(1, description="shards heads, the feed-forward dimension and the vocabulary")
    sequence: int = Field(1, description="shards the tokens of a row")
    slices: int = Field(1, ge=1, description="TPU slices over the data-centre network; must divide data")
    auto: bool = Field(False, description="choose the sizes from devices, model and batch")
    rollout_devices: int = Field(
        0,
        ge=0,
        description="objective grpo: so many devices, equally many of each process, only generate, for the next update, while "
        "the others train",
    )

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        """Accept `mesh: auto` for `mesh: {auto: true}`."""
        return {"auto": True} if value == "auto" else value

    @model_validator(mode="after")
    def _one_open_axis(self) -> "MeshConfig":
        # A run's config.yaml names all axes, with their defaults.
        chosen = (axis for axis in ("data", "fsdp", "expert", "tensor", "sequence") if axis in self.model_fields_set)
        given = [axis for axis in chosen if getattr(self, axis) != type(self).model_fields[axis].default]
        if self.auto and given:
            raise ValueError(f"mesh.auto chooses the sizes, and {', '.join(given)} is given too; leave out one of them")
        sizes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "expert", "tensor", "sequence")}
        wrong = {axis: size for axis, size in sizes.items() if size < 1 and size != -1}
        if wrong:
            raise ValueError(f"an axis has at least one device, or -1 for what is left; found {wrong}")
        if (free := [axis for axis, size in sizes.items() if size == -1])[1:]:
            raise ValueError(
                f"only one axis may be -1; found {', '.join(free)}. Write mesh.{free[-1]}: 1 to keep mesh.{free[0]} open"
            )
        return self
