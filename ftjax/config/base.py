"""The strictness that every configuration section shares."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


def _kinds(annotation: Any) -> set[Any]:
    return {annotation}.union(*(_kinds(argument) for argument in get_args(annotation)))


class Section(BaseModel):
    """A frozen group of settings: unknown keys are errors, and nothing is changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        """`r: true` is a slip, not 1: pydantic would take it, but does not take the text `true` for a number."""
        if not isinstance(values, dict):
            return values
        numbers = {
            name
            for name, field in cls.model_fields.items()
            if (kinds := _kinds(field.annotation)) & {int, float} and not kinds & {bool, str, dict, Any}
        }
        return {key: str(item).lower() if isinstance(item, bool) and key in numbers else item for key, item in values.items()}
