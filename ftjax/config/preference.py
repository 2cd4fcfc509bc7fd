"""Sections of `objective:` that train from preferences; names and defaults are TRL's."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ftjax.config.base import Section

# Losses of `dpo`; those in DIFFERENCES depend on the difference of the two scores alone, and so take any f-divergence.
DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # those that label_smoothing changes
DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
PAIRWISE = ("dpo", "simpo", "cpo", "orpo", "reward")  # objectives whose rows are pairs
LOSS_CHUNK = "tokens whose logits are in memory at a time, per device"


# Losses of DPO in other tools that are objectives of their own here.
ELSEWHERE = {"simpo": "simpo", "orpo": "orpo", "cpo": "cpo", "kto": "kto", "kto_pair": "kto", "reward": "reward"}


def _losses(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name.lower() in ELSEWHERE:
            raise ValueError(f"{name} is an objective of its own; write objective.name: {ELSEWHERE[name.lower()]}")
    return names


def without_effect(section: Section, needs: dict[str, tuple[bool, str]]) -> None:
    """Refuse settings that change nothing.

    Args:
        needs: for each of them, whether the section uses it, and what would make it so.

    Raises ValueError for one that is not used and not at its default.
    """
    for name, (used, what) in needs.items():
        value = getattr(section, name)
        if not used and value != type(section).model_fields[name].default:
            raise ValueError(f"{name} {value} changes nothing without {what}; add that, or leave {name} out")


class DpoConfig(Section):
    """Direct preference optimisation: raises `chosen` over `rejected`, relative to the model before training."""

    name: Literal["dpo"] = "dpo"
    loss_type: Annotated[list[DpoLoss], BeforeValidator(_losses)] = Field(
        ["sigmoid"], min_length=1, description="one loss, or a list of losses that are added"
    )
    loss_weights: list[float] | None = Field(None, description="factors of the losses; null: 1 each")
    beta: float = Field(0.1, gt=0, description="higher: stays closer to the reference model")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of pairs taken as flipped, for robust (below 0.5), exo_pair (above 0) and aot",
    )
    f_divergence_type: Divergence = Field("reverse_kl", description="what keeps the model close to its reference")
    f_alpha_divergence_coef: float = Field(0.5, description="alpha of alpha_divergence")
    discopop_tau: float = Field(0.05, gt=0, description="temperature of discopop")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="weight of tokens beyond the length of the shorter answer (LD-DPO); null: 1"
    )
    reference_free: bool = Field(False, description="compare with a uniform reference instead of the model before training")
    precompute_ref_log_probs: bool = Field(
        False, description="run the reference model once before training, and keep its log-probabilities in the data cache"
    )
    sync_ref_model: bool = Field(False, description="move the reference towards the model now and then (TR-DPO); full only")
    ref_model_mixup_alpha: float = Field(0.6, gt=0, le=1, description="share of the model in a new reference")
    ref_model_sync_steps: int = Field(512, ge=1, description="updates between two synchronisations")
    loss_chunk: int = Field(512, ge=1, description=LOSS_CHUNK)

    @property
    def weighted_losses(self) -> tuple[tuple[str, float], ...]:
        """Each loss with its factor."""
        return tuple(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    @model_validator(mode="after")
    def _fits(self) -> "DpoConfig":
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss_type)} losses in loss_type")
        if self.f_divergence_type != "reverse_kl" and (other := sorted(set(self.loss_type) - set(DIFFERENCES))):
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type}: loss_type {', '.join(other)} is defined for reverse_kl alone; "
                f"{', '.join(DIFFERENCES)} take others"
            )
        without_effect(self, {
            "discopop_tau": ("discopop" in self.loss_type, "discopop in loss_type"),
            "f_alpha_divergence_coef": (self.f_divergence_type == "alpha_divergence", "f_divergence_type: alpha_divergence"),
            "ref_model_mixup_alpha": (self.sync_ref_model, "sync_ref_model: true"),
            "ref_model_sync_steps": (self.sync_ref_model, "sync_ref_model: true"),
        })  # fmt: skip
        if self.label_smoothing and not set(self.loss_type) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing {self.label_smoothing} changes nothing in loss_type {', '.join(self.loss_type)}; "
                f"{', '.join(SMOOTHED)} use it"
            )
        if "robust" in self.loss_type and self.label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing {self.label_smoothing}: robust needs a share of flipped pairs below 0.5")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ValueError("label_smoothing 0: exo_pair takes its logarithm; the paper recommends 0.001")
        if self.reference_free and (self.precompute_ref_log_probs or self.sync_ref_model):
            raise ValueError("reference_free has no reference model to precompute or synchronise; keep one of them")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model changes the reference, so it cannot be computed before training; keep one of them")
        return self


class SimpoConfig(Section):
    """SimPO: the mean log-probability of an answer's tokens is its reward, with a target margin; no reference model."""

    name: Literal["simpo"] = "simpo"
    beta: float = Field(0.1, gt=0, description="factor on the mean log-probabilities; the paper uses 2 to 10")
    simpo_gamma: float = Field(0.5, ge=0, description="target margin between the rewards; the paper uses 0.3 to 0.5 of beta")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of pairs taken as flipped")
    alpha: float = Field(0.0, description="shape of the reward (AlphaPO); 0: the mean log-probability")
    loss_chunk: int = Field(512, ge=1, description=LOSS_CHUNK)


class CpoConfig(Section):
    """Contrastive preference optimisation: a preference loss without a reference model, plus the loss of the chosen answer."""

    name: Literal["cpo"] = "cpo"
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = Field(
        "sigmoid", description="loss of the difference between the two answers"
    )
    beta: float = Field(0.1, gt=0, description="factor on the difference of the log-probabilities")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of pairs taken as flipped (sigmoid, simpo, alphapo)")
    cpo_alpha: float = Field(1.0, ge=0, description="factor on the loss of the chosen answer")
    simpo_gamma: float = Field(0.5, ge=0, description="target margin of simpo and alphapo")
    alpha: float = Field(0.0, description="shape of the reward (AlphaPO); 0: the log-probability")
    loss_chunk: int = Field(512, ge=1, description=LOSS_CHUNK)

    @model_validator(mode="after")
    def _fits(self) -> "CpoConfig":
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing {self.label_smoothing} changes nothing in loss_type {self.loss_type}")
        without_effect(self, {"simpo_gamma": (self.loss_type in ("simpo", "alphapo"), "loss_type: simpo or alphapo")})
        return self


class OrpoConfig(Section):
    """ORPO: the loss of the chosen conversation plus an odds ratio; no reference model."""

    name: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, ge=0, description="factor on the odds ratio (lambda in the paper)")
    loss_chunk: int = Field(512, ge=1, description=LOSS_CHUNK)


class KtoConfig(Section):
    """KTO: answers that are wanted or not, one at a time, relative to the model before training."""

    name: Literal["kto"] = "kto"
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="relative to the mean divergence of the batch, or to zero"
    )
    beta: float = Field(0.1, gt=0, description="higher: stays closer to the reference model")
    desirable_weight: float = Field(1.0, ge=0, description="factor on the loss of wanted answers")
    undesirable_weight: float = Field(1.0, ge=0, description="factor on the loss of unwanted answers")
    precompute_ref_log_probs: bool = Field(
        False, description="run the reference model once before training, and keep its log-probabilities in the data cache"
    )
    loss_chunk: int = Field(512, ge=1, description=LOSS_CHUNK)


class RewardConfig(Section):
    """A reward model: one score per conversation, higher for `chosen` (Bradley-Terry)."""

    name: Literal["reward"] = "reward"
    center_rewards_coefficient: float | None = Field(
        None, ge=0, description="factor on the squared sum of a pair's scores, which keeps them near 0; null: none"
    )
    loss_chunk: int = Field(512, ge=1, description=LOSS_CHUNK)
