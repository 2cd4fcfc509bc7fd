"""Commented configuration files to begin with, one for each usual purpose; the comments are the schema's descriptions."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftjax.config import Config
from ftjax.config.reference import Key, parts
from ftjax.config.schema import section_fields
from ftjax.config.yaml_text import dump
from ftjax.errors import UserError

WIDTH = 100
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Example:
    """An example.

    Attributes:
        purpose: one line.
        row: a row of the data that it trains on.
        settings: values by dotted key.
        more: keys that often need another value; they are shown with their defaults, as comments.
    """

    purpose: str
    row: str
    settings: Mapping[str, Any]
    more: Sequence[str] = ()


_ANSWER = '{"prompt": "Translate to French: good morning", "completion": "bonjour"}'
_PAIR = '{"prompt": "Tell me a joke.", "chosen": "Why did the chicken ...", "rejected": "No."}'
_LORA = {"method.name": "lora", "method.r": 16, "method.lora_alpha": 32}
_MORE = ("model.revision", "data.validation_split", "data.format", "data.columns", "data.template", "data.truncation",
         "training.eval_steps", "training.save_steps", "training.early_stopping_patience", "training.report_to")  # fmt: skip
_LORA_MORE = ("method.lora_dropout", "method.target_modules", "method.use_rslora", "method.use_dora", *_MORE)


def _settings(method: Mapping[str, Any], rate: float, **objective: Any) -> dict[str, Any]:
    return {
        "model.path": MODEL, "model.dtype": "bfloat16", "model.compute_dtype": "bfloat16", **method,
        **{f"objective.{name}": value for name, value in objective.items()},
        "data.train": "train.jsonl", "data.max_length": 1024, "data.packing": True,
        "optimizer.learning_rate": rate, "optimizer.lr_scheduler_type": "cosine", "optimizer.warmup_ratio": 0.03,
        "training.num_train_epochs": 2.0, "training.global_batch_size": 8, "training.gradient_accumulation_steps": 1,
        "training.logging_steps": 10, "output_dir": "runs/first",
    }  # fmt: skip


EXAMPLES = {
    "lora": Example("an adapter on instructions and answers", _ANSWER, _settings(_LORA, 2e-4, name="sft"), _LORA_MORE),
    "qlora": Example(
        "an adapter on a base model in 4 bits", _ANSWER,
        {**_settings(_LORA, 2e-4, name="sft"), "model.quantization": "nf4"}, _LORA_MORE,
    ),
    "full": Example(
        "all weights of the model", _ANSWER, _settings({"method.name": "full"}, 1e-5, name="sft"),
        ("method.train", "method.freeze", "optimizer.weight_decay", "optimizer.state_dtype", *_MORE),
    ),
    "classification": Example(
        "the class of a text", '{"text": "A fine film.", "label": "positive"}',
        _settings(_LORA, 2e-4, name="classification", head=False), ("objective.labels", *_LORA_MORE),
    ),
    "dpo": Example(
        "from preferences: pairs of a better and a worse answer", _PAIR,
        _settings(_LORA, 1e-5, name="dpo", beta=0.1, loss_type=["sigmoid"]), _LORA_MORE,
    ),
    "kto": Example(
        "from single answers that are wanted or not", '{"prompt": "Tell me a joke.", "completion": "No.", "label": false}',
        _settings(_LORA, 1e-5, name="kto", beta=0.1), ("objective.desirable_weight", *_LORA_MORE),
    ),
    "reward": Example(
        "a reward model, from pairs of a better and a worse answer", _PAIR, _settings(_LORA, 1e-4, name="reward"), _LORA_MORE
    ),
    "grpo": Example(
        "from rewards of its own answers", '{"prompt": "What is 3 + 4?", "answer": "7"}',
        _settings(
            _LORA, 2e-5, name="grpo", rewards=[{"name": "exact_match"}], num_generations=8, max_completion_length=256,
            temperature=1.0,
        ), ("objective.loss_type", "objective.beta", *_LORA_MORE),
    ),
}  # fmt: skip


def example(name: str) -> str:
    """Return the file of this example. Raises UserError for an unknown name."""
    if name not in EXAMPLES:
        known = "\n".join(f"  {known:<15} {one.purpose}" for known, one in EXAMPLES.items())
        raise UserError(f"config --example {name}: there is no such example; choose one of\n{known}")
    chosen = EXAMPLES[name]
    described = _described(chosen.settings)
    lines = [
        f"# Fine-tuning: {chosen.purpose}.",
        "#",
        "#   ftjax preview run.yaml   shows the data as the model sees it",
        "#   ftjax train run.yaml     trains, and resumes if it was stopped",
        "#   ftjax config KEY         explains a key",
        "#",
        "# Lines like `#key: value`, without a space, are settings that are often changed, with their defaults.",
        f"# A row of the data: {chosen.row}",
    ]
    for section in Config.model_fields:
        if section not in section_fields():
            lines += ["", *comment(described[section].meaning, ""), f"{section}: {_value(chosen.settings[section])}"]
            continue
        own = {key: value for key, value in chosen.settings.items() if key.startswith(f"{section}.")}
        more = [key for key in chosen.more if key.startswith(f"{section}.") and key not in own]
        if not own and not more:
            continue
        lines += ["", f"{section}:"]
        for key, value in own.items():
            meaning = described[key].meaning if key in described else _names(section)
            lines += [*comment(meaning, "  "), f"  {key.partition('.')[2]}: {_value(value)}"]
        for key in more:
            lines += [*comment(described[key].meaning, "  "), f"  #{key.partition('.')[2]}: {described[key].default}"]
    return "\n".join(lines) + "\n"


def _described(settings: Mapping[str, Any]) -> dict[str, Key]:
    """Return all keys that these settings may have, by dotted name."""
    chosen = {settings.get("method.name"), settings.get("objective.name"), None}
    return {key.name: key for part in parts() if part.variant in chosen for key in part.keys}


def _names(section: str) -> str:
    return f"one of {', '.join(part.variant for part in parts() if part.name == section and part.variant)}"


def comment(text: str, indent: str) -> list[str]:
    """Return a text as lines of a comment."""
    prefix = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)


def _value(value: Any) -> str:
    """Return a value on one line of YAML."""
    if isinstance(value, list):
        return f"[{', '.join(_value(one) for one in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(one)}' for key, one in value.items())}}}"
    return dump([value])[2:].strip()
