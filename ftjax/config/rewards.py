"""Sections of `objective:` that learn from rewards; names and defaults are TRL's."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ftjax.config.base import Section
from ftjax.config.preference import LOSS_CHUNK, without_effect

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # losses that clip the ratio to epsilon
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class RewardSpec(Section):
    """One reward function.

    Attributes:
        name: a built-in reward, a Python file (`FILE.py` or `FILE.py:FUNCTION`), or the folder of a reward model.
        weight: factor on its values.
        options: arguments of a built-in reward.
    """

    name: str = Field(min_length=1, description="a built-in reward, FILE.py:FUNCTION, or the folder of a reward model")
    weight: float = Field(1.0, description="factor on its values")
    options: dict[str, object] = Field({}, description="arguments of a built-in reward")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """Accept `exact_match` for `{name: exact_match}`."""
        return {"name": value} if isinstance(value, str) else value

    @property
    def is_code(self) -> bool:
        """Whether it is a Python file."""
        return self.name.partition(":")[0].endswith(".py")


class Sampled(Section):
    """How the model in training generates answers."""

    max_completion_length: int = Field(256, ge=1, description="maximum tokens of an answer")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; probabilities in the loss have it, too")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling")
    top_k: int = Field(0, ge=0, description="sample from so many tokens; 0: all")
    min_p: float = Field(0.0, ge=0, le=1, description="sample from tokens at least so likely, relative to the likeliest")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens of prompt and answer become less likely")
    generation_batch_rows: int = Field(64, ge=1, description="answers that are generated at a time")
    logged_completions: int = Field(4, ge=0, description="answers that are logged at every logged step")


class Rollouts(Sampled):
    """What `grpo` and `rloo` share: how answers are generated and rewarded."""

    rewards: list[RewardSpec] = Field([], description="reward functions, added with their weights")
    environment: str | None = Field(
        None, description="FILE.py or FILE.py:CLASS, with which an answer is a dialogue: reset, and step or tools; null: none"
    )
    max_tool_calling_iterations: int | None = Field(
        None, ge=1, description="most replies of the environment to an answer; null: until one of both ends it"
    )
    num_generations: int = Field(8, ge=2, description="answers to one prompt, which are compared with each other")
    num_iterations: int = Field(1, ge=1, description="updates for each batch of answers")
    reward_timeout: float = Field(
        600.0, gt=0, description="seconds that one reward function may take for the answers of an update"
    )
    mask_truncated_completions: bool = Field(False, description="do not train answers that end at max_completion_length")
    loss_chunk: int = Field(512, ge=1, description=LOSS_CHUNK)

    @model_validator(mode="before")
    @classmethod
    def _rewarded_by_environment(cls, value: Any) -> Any:
        """Take the environment's own reward where there is no other."""
        if isinstance(value, dict) and value.get("environment") and not value.get("rewards"):
            return {**value, "rewards": ["environment"]}
        return value

    @model_validator(mode="after")
    def _turns(self) -> "Rollouts":
        without_effect(self, {"max_tool_calling_iterations": (self.environment is not None, "environment")})
        return self

    @property
    def on_policy(self) -> bool:
        """Whether answers are trained by the very parameters that generated them."""
        return self.num_iterations == 1


class GrpoConfig(Rollouts):
    """Group relative policy optimisation: answers to one prompt are compared with each other by their rewards."""

    name: Literal["grpo"] = "grpo"
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = Field(
        "dapo", description="how the ratio to the sampling policy is bounded, and what losses are averaged over"
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="ratio of each token, or the geometric mean over an answer (GSPO)"
    )
    epsilon: float = Field(0.2, ge=0, description="lower bound of the ratio is 1 - epsilon")
    epsilon_high: float | None = Field(
        None, ge=0, description="upper bound is 1 + epsilon_high; null: epsilon. cispo: the bound"
    )
    delta: float | None = Field(None, gt=0, description="bound of the ratio where the advantage is negative, too; null: none")
    beta: float = Field(0.0, ge=0, description="factor on the KL divergence from the reference model; 0: no reference model")
    use_bias_correction_kl: bool = Field(True, description="weight the KL divergence with the ratio")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="divide advantages by the standard deviation of this"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize", description="several rewards: add them first, or normalise each in its group first (GDPO)"
    )
    sapo_temperature_neg: float = Field(1.05, gt=0, description="sapo: temperature where the advantage is not positive")
    sapo_temperature_pos: float = Field(1.0, gt=0, description="sapo: temperature where the advantage is positive")
    vespo_k_pos: float = Field(2.0, description="vespo: exponent for advantages of at least 0")
    vespo_lambda_pos: float = Field(3.0, description="vespo: decay for advantages of at least 0")
    vespo_k_neg: float = Field(3.0, description="vespo: exponent for advantages below 0")
    vespo_lambda_neg: float = Field(2.0, description="vespo: decay for advantages below 0")
    top_entropy_quantile: float = Field(1.0, gt=0, le=1, description="train this share of the tokens, of the highest entropy")
    entropy_coef: float = Field(0.0, description="factor on the mean entropy, which is added to what is maximised")
    off_policy_mask_threshold: float | None = Field(
        None, gt=0, description="leave out bad answers whose mean log-ratio to the sampling policy is above this; null: none"
    )
    importance_sampling_correction: Correction | None = Field(
        None, description="corrects for a sampling policy that is not that of the trainer; null: none"
    )
    importance_sampling_clip_min: float | None = Field(None, ge=0, description="lower bound of that correction")
    importance_sampling_clip_max: float | None = Field(3.0, gt=0, description="upper bound of that correction")
    dynamic_sampling: bool = Field(
        False, description="replace prompts whose answers all have the same reward by new ones (DAPO)"
    )
    max_redraws: int = Field(8, ge=1, description="dynamic_sampling: at most so often for an update")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper epsilon."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    @model_validator(mode="after")
    def _fits(self) -> "GrpoConfig":
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("loss_type cispo bounds the ratio by epsilon_high, which is not set; the paper has 5.0")
        without_effect(self, {
            "delta": (self.loss_type in CLIPPED, f"loss_type {', '.join(CLIPPED)}"),
            "sapo_temperature_neg": (self.loss_type == "sapo", "loss_type: sapo"),
            "sapo_temperature_pos": (self.loss_type == "sapo", "loss_type: sapo"),
            **{
                f"vespo_{name}": (self.loss_type == "vespo", "loss_type: vespo")
                for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
            },
            "max_redraws": (self.dynamic_sampling, "dynamic_sampling"),
            "use_bias_correction_kl": (self.beta > 0, "beta above 0"),
            "importance_sampling_clip_min": (bool(self.importance_sampling_correction), "importance_sampling_correction"),
            "importance_sampling_clip_max": (bool(self.importance_sampling_correction), "importance_sampling_correction"),
        })  # fmt: skip
        return self


class RlooConfig(Rollouts):
    """REINFORCE leave-one-out: an answer is compared with the mean reward of the others to its prompt."""

    name: Literal["rloo"] = "rloo"
    num_generations: int = Field(2, ge=2, description="answers to one prompt, which are compared with each other")
    epsilon: float = Field(0.2, ge=0, description="lower bound of the ratio is 1 - epsilon")
    epsilon_high: float | None = Field(None, ge=0, description="upper bound is 1 + epsilon_high; null: epsilon")
    beta: float = Field(0.05, ge=0, description="factor on the KL divergence from the reference model, as part of the reward")
    normalize_advantages: bool = Field(False, description="to mean 0 and standard deviation 1 over a batch")
    reward_clip_range: tuple[float, float] | None = Field(None, description="bounds of the rewards; null: none")

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper epsilon."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high
