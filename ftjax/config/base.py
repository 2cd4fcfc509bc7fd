"""The base class of configuration sections, which makes them strict."""

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
        """Refuse `r: true`, a slip that pydantic would read as 1; it does not read the text `true` as a number."""
        if not isinstance(values, dict):
            return values
        numbers = {
            name
            for name, field in cls.model_fields.items()
            if (kinds := _kinds(field.annotation)) & {int, float} and not kinds & {bool, str, dict, Any}
        }
        return {key: str(item).lower() if isinstance(item, bool) and key in numbers else item for key, item in values.items()}
