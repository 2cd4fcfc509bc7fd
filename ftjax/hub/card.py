"""The model card (README.md) of a run's result: how it was trained, its metrics, and how to load it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from ftjax.config import Config
from ftjax.hub.fetch import HUB
from ftjax.hub.gguf.file import open_gguf
from ftjax.hub.public import is_hub_id, public_name, without_paths
from ftjax.methods import method_of
from ftjax.models.classifier import REGRESSION, SINGLE
from ftjax.objectives import head_of

LOADING = "How to load it"
# Settings that are local paths or addresses
PLACES = ("adapter_path", "checkpoint_dir", "teacher_logprobs", "teacher_model_server_url")
PACKAGES = ("ftjax", "jax", "flax", "optax", "transformers", "tokenizers", "datasets")


@dataclass(frozen=True)
class CardFacts:
    """The contents of a card; `model_card` looks up nothing else.

    Attributes:
        base_model: Hub id, or the name of a local folder or file.
        method, objective: their names (`lora`, `sft`).
        method_settings, training: settings by name, printed as YAML.
        data: lines that describe the training data, with counts.
        metrics: results by name, as in metrics.jsonl.
        kind: an adapter for `base_model`, or a whole model.
        step: optimizer updates made.
        versions: package -> version.
        datasets: Hub ids of the training data.
        license: the base model's, as the Hub spells it.
        rows: number of embedding rows, if the adapter's differs from the base model's.
        library: the adapter's library, `peft` or `adapters`.
        classes: names of a classification head's classes, by index.
        problem_type: of a classification head, as transformers calls it.
    """

    base_model: str
    method: str
    objective: str
    kind: Literal["adapter", "model"]
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    license: str | None = None
    rows: int | None = None
    library: str = "peft"
    classes: Sequence[str] = ()
    problem_type: str | None = None


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md, with the front matter that the Hub reads."""
    on_hub = _on_hub(facts.base_model)
    data = ModelCardData(
        base_model=facts.base_model if on_hub else None,
        library_name={"peft": "peft", "adapters": "adapter-transformers"}[facts.library]
        if facts.kind == "adapter"
        else "transformers",
        pipeline_tag="text-classification" if facts.classes else "text-generation",
        license=facts.license,
        datasets=list(facts.datasets) or None,
        tags=["ftjax", facts.method, facts.objective],
    )
    base = f"[{facts.base_model}]({HUB}{facts.base_model})" if on_hub else f"`{facts.base_model}`"
    what = f"a {facts.method} adapter for {base}" if facts.kind == "adapter" else f"{base}, fine-tuned ({facts.method})"
    steps = f", {facts.step:,} optimizer steps" if facts.step is not None else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(facts.base_model).name} fine-tuned with ftjax",
        f"This is {what}, trained with the objective `{facts.objective}`{steps}.",
        _section("Data", "\n".join(f"- {line}" for line in facts.data)),
        _section("Results", _table(facts.metrics)),
        _section("Training", _settings({"method": facts.method_settings, **facts.training})),
        _section(LOADING, _loading(facts)),
        _section("Versions", ", ".join(f"{name} {number}" for name, number in facts.versions.items())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def run_card(
    config: Config, *, step: int, data: Sequence[str], metrics: Mapping[str, float], whole: bool, rows: int | None = None
) -> str:
    """Build the card of a run. Local paths are left out: a card may be published.

    Args:
        whole: a whole model, not an adapter.
        rows: number of embedding rows, if the run changed it.
    """
    sections, head = config.model_dump(mode="json"), head_of(config)
    paths = [source.path for which in ("train", "validation") for source in config.data.sources(which)]
    return model_card(
        CardFacts(
            base_model=public_name(config.model.path),
            method=config.method.name,
            objective=config.objective.name,
            kind="model" if whole else "adapter",
            method_settings={key: value for key, value in sections["method"].items() if key not in PLACES},
            training={"objective": _public(sections["objective"]), "optimizer": sections["optimizer"]}
            | {"training": {key: value for key, value in sections["training"].items() if key not in PLACES}}
            | {"model": {key: sections["model"][key] for key in ("dtype", "compute_dtype")}}
            | {"data": {key: sections["data"][key] for key in ("max_length", "packing")}},
            data=[without_paths(line, paths) for line in data],
            metrics=metrics,
            step=step,
            versions=installed_versions(),
            datasets=[source.path for source in config.data.sources("train") if is_hub_id(source.path)],
            license=base_license(config.model.path, config.model.revision),
            rows=rows,
            library=method_of(config.method).library,
            classes=(head and head.classes) or (),
            problem_type=head and head.problem_type,
        )
    )


def _public(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an objective without local paths and addresses; teachers, rewards and environments keep their
    names."""
    kept = {key: value for key, value in objective.items() if key not in PLACES}
    if teacher := kept.get("teacher_model_name_or_path"):
        kept["teacher_model_name_or_path"] = public_name(teacher)
    if environment := kept.get("environment"):
        kept["environment"] = _file_name(environment)
    if "rewards" in kept:
        kept["rewards"] = [_reward(one) for one in kept["rewards"]]
    return kept


def _reward(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reward without paths and addresses, also in its options."""
    options = {
        key: _file_name(value) if isinstance(value, str) and Path(value).expanduser().exists() else value
        for key, value in spec["options"].items()
        if not (isinstance(value, str) and "://" in value)
    }
    is_place = ".py" in spec["name"] or Path(spec["name"]).expanduser().exists()
    return {**spec, "name": _file_name(spec["name"]) if is_place else spec["name"], "options": options}


def _file_name(place: str) -> str:
    """Return the last part of `folder/file.py:NAME`, or of another path."""
    path, colon, name = place.partition(":")
    return f"{public_name(path)}{colon}{name}"


def with_section(card: str, title: str, text: str) -> str:
    """Return the card with this section: in place of one with the same title, else before the loading section or at the
    end."""
    part = f"## {title}\n\n{text.strip()}\n"
    lines, at, fenced = card.splitlines(keepends=True), {}, False
    for number, line in enumerate(lines):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            at[line[3:].strip()] = number
    if title in at:
        end = min((number for number in at.values() if number > at[title]), default=len(lines))
        before, after = lines[: at[title]], lines[end:]
    else:
        end = at.get(LOADING, len(lines))
        before, after = lines[:end], lines[end:]
    return "\n\n".join(part for part in ("".join(before).rstrip(), part.rstrip(), "".join(after).rstrip()) if part) + "\n"


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that affect a run's results."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def base_license(path: str, revision: str | None = None) -> str | None:
    """Return the licence in a base model's card (or GGUF file); None if there is none, or no local card."""
    if path.endswith(".gguf"):
        return open_gguf(Path(path)).metadata.get("general.license")
    card = Path(path) / "README.md"
    if is_hub_id(path.removeprefix(HUB)):
        cached = try_to_load_from_cache(path.removeprefix(HUB), "README.md", revision=revision)
        if not isinstance(cached, str):
            return None
        card = Path(cached)
    if not card.is_file():
        return None
    try:
        return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
    except (ValueError, yaml.YAMLError, UnicodeDecodeError):  # a malformed card names no licence
        return None


def _on_hub(name: str) -> bool:
    """Return whether `base_model`, a Hub id or a bare name, is a Hub id: only that has a slash."""
    return "/" in name


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def _settings(sections: Mapping[str, Any]) -> str:
    """Format settings as a YAML block, without empty and null ones."""
    kept = {
        name: {key: value for key, value in section.items() if value not in (None, [], {})}
        for name, section in sections.items()
        if section
    }
    return f"```yaml\n{yaml.safe_dump(kept, sort_keys=False)}```" if kept else ""


def _loading_head(facts: CardFacts) -> str:
    several = "" if facts.problem_type == SINGLE else ", top_k=None"
    task = "regression" if facts.problem_type == REGRESSION else "classification"
    if facts.kind == "model":
        return (
            "```python\n"
            "from transformers import pipeline\n\n"
            f'classify = pipeline("text-classification", "THIS_FOLDER"{several})\n'
            "```\n\n"
            f"- ftjax: `ftjax evaluate THIS_FOLDER --task {task} --data FILE`"
        )
    base = facts.base_model if _on_hub(facts.base_model) else "BASE_FOLDER"
    return (
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification\n\n"
        f"id2label = {dict(enumerate(facts.classes))}\n"
        "model = AutoModelForSequenceClassification.from_pretrained(\n"
        f'    "{base}", id2label=id2label, problem_type="{facts.problem_type}"\n'
        ")\n"
        "model.config.pad_token_id = ...  # the tokenizer's, for batches of several texts\n"
        'model = PeftModel.from_pretrained(model, "THIS_FOLDER")\n'
        "```\n\n"
        "- `ftjax export RUN --merge --out FOLDER` writes base, adapter and head as one model, with the names of its classes"
    )


def _loading(facts: CardFacts) -> str:
    if facts.classes:
        return _loading_head(facts)
    base = facts.base_model
    if facts.kind == "model":
        return (
            "```python\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
            "```\n\n"
            "- ftjax: `ftjax generate THIS_FOLDER --prompt TEXT`\n"
            "- vLLM: `vllm serve THIS_FOLDER`\n"
            "- llama.cpp: `python convert_hf_to_gguf.py THIS_FOLDER --outfile model.gguf`"
        )
    note, shown, gguf = "", base, ""
    resize = f"model.resize_token_embeddings({facts.rows}, mean_resizing=False)\n" if facts.rows else ""
    if not _on_hub(base):
        base, shown = "BASE_FOLDER", base if base.endswith(".gguf") else "BASE_FOLDER"
        note = (
            f"`BASE_FOLDER` is the Hugging Face folder of `{facts.base_model}`. Where there is none at hand, "
            "`ftjax export RUN --merge --out FOLDER` writes base and adapter as one model.\n\n"
        )
    if base == "BASE_FOLDER" and facts.base_model.endswith(".gguf"):
        gguf = " A GGUF file is not enough for `convert_lora_to_gguf.py`: it wants that folder as `--base`."
    patterns = [f"`{name}`" for name in ("rank_pattern", "alpha_pattern") if facts.method_settings.get(name)]
    ignored = f" vLLM ignores this adapter's {' and '.join(patterns)} without a word." if patterns else ""
    if facts.library == "adapters":
        return (
            "```python\n"
            "import adapters\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
            "adapters.init(model)\n"
            'model.load_adapter("THIS_FOLDER", use_safetensors=True, set_active=True)\n'
            "```\n\n"
            f"- ftjax: `ftjax generate {shown} --adapter THIS_FOLDER --prompt TEXT`\n\n"
            "Families that the library does not know need an `AdapterModelInterface`: see its documentation."
        )
    return (
        f"{note}```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f"{resize}"
        'model = PeftModel.from_pretrained(model, "THIS_FOLDER")\n'
        "```\n\n"
        f"- ftjax: `ftjax generate {shown} --adapter THIS_FOLDER --prompt TEXT`\n"
        f"- vLLM: `vllm serve {base} --enable-lora --lora-modules tuned=THIS_FOLDER`\n"
        f"- llama.cpp: `python convert_lora_to_gguf.py THIS_FOLDER --base BASE_FOLDER --outfile adapter.gguf`\n\n"
        "vLLM and llama.cpp take plain LoRA of one rank: `ftjax export RUN --portable --out FOLDER` writes it so, or says why "
        f"it cannot be.{ignored}{gguf}"
    )
