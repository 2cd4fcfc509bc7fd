"""Objectives: one file per objective, each with an `OBJECTIVE` record."""

import importlib

from ftjax.config import Config
from ftjax.config.schema import add_objective
from ftjax.data.encoding import RowEncoding
from ftjax.objectives.objective import Head, Objective

NAMES = ("sft", "classification", "dpo", "simpo", "cpo", "orpo", "kto", "reward", "grpo", "rloo", "distill")

# name in the configuration -> file, or the record itself
OBJECTIVES: dict[str, str | Objective] = {name: name for name in NAMES}


def objective_of(config: Config) -> Objective:
    """Return the objective of a configuration."""
    found = OBJECTIVES[config.objective.name]
    return importlib.import_module(f"ftjax.objectives.{found}").OBJECTIVE if isinstance(found, str) else found


def head_of(config: Config) -> Head | None:
    """Return the classification head that the configuration's objective trains."""
    return objective_of(config).head(config.objective)


def encoding_of(config: Config) -> RowEncoding:
    """Return the encoding of rows into documents of the configuration's objective."""
    return objective_of(config).encoding(config.objective)


def generates(config: Config) -> bool:
    """Return whether the configuration's objective trains answers that the model in training generates."""
    return objective_of(config).generates(config.objective)


def register(objective: Objective) -> None:
    """Register an objective by the name of its section, for configurations too."""
    OBJECTIVES[add_objective(objective.config)] = objective
