"""Checks that it is the same run: on all hosts, and as the run that wrote the checkpoint."""

from typing import Any

from ftjax.config import Config
from ftjax.config.load import flatten_config
from ftjax.data.pipeline import Split
from ftjax.errors import UserError
from ftjax.hub.card import installed_versions
from ftjax.hub.run_folder import starting_adapter
from ftjax.hub.same_model import model_facts
from ftjax.objectives import objective_of
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.teacher import place_of

# Settings that may differ on resuming: they do not change the results, or only their rounding.
_FREE = (
    "mesh.", "training.logging_steps", "training.save_steps", "training.save_total_limit", "training.report_to",
    "training.profile_steps", "training.checkpoint_dir", "training.allow_changed_data",
    "training.loss_spike_factor", "training.max_skipped_updates",
    "training.eval_batch_size", "model.remat", "model.attention", "objective.loss_chunk", "output_dir", "evaluate.", "check.",
)  # fmt: skip
# Paths on a host's own disk. Their content is compared instead: documents, files of model and adapter, the run folder.
PLACES = (
    "data.train", "data.validation", "model.path", "model.tokenizer", "method.adapter_path", "output_dir",
    "training.checkpoint_dir", "objective.teacher_model_name_or_path", "objective.teacher_logprobs",
)  # fmt: skip


Documents = dict[str, dict[str, Any]]  # by data set: its files, and `Split.fingerprint`


def is_free(key: str, config: Config) -> bool:
    """Return whether a setting may differ from that of the checkpoint that a run resumes from."""
    if config.training.allow_changed_data and key in ("data.train", "data.validation"):
        return True
    if key == "mesh.rollout_devices":  # answers are then an update behind
        return False
    return any(key.startswith(free) if free.endswith(".") else key == free for free in _FREE)


def facts_to_agree(config: Config, documents: Documents, steps: int | None, checkpoint: int | None) -> dict[str, Any]:
    """Return facts that must be equal on all hosts: configuration, documents, model, updates, newest checkpoint, versions."""
    facts: dict[str, Any] = {key: str(value) for key, value in flatten_config(config).items() if key not in PLACES}
    facts |= {"total steps": steps, "newest checkpoint": checkpoint}
    facts |= model_facts(config.model.path, config.model.revision, starting_adapter(config.method))
    if (teacher := objective_of(config).teacher(config.objective)) is not None:
        facts |= place_of(*teacher).facts()
    for name, found in documents.items():
        facts |= {f"{name}: {part}": value for part, value in found.items() if part != "files"}
    return facts | {f"version of {package}": version for package, version in installed_versions().items()}


def fingerprints(train: Split, validation: Split | None) -> Documents:
    """Return fingerprints of the documents of a run, as JSON."""
    splits = {"data.train": train, "data.validation": validation}
    return {name: {"files": split.report.source, **split.fingerprint()} for name, split in splits.items() if split is not None}


def refuse_other_documents(checkpoints: Checkpoints, documents: Documents, config: Config) -> None:
    """Raise UserError if the newest checkpoint was trained on other documents, unless `training.allow_changed_data`.

    The position in the data would point at other rows: some would be seen again, others never.
    """
    meta = checkpoints.meta()
    saved = (meta or {}).get("documents")
    if saved is None or config.training.allow_changed_data:
        return
    lines = []
    for name in dict.fromkeys([*saved, *documents]):
        before, now = saved.get(name), documents.get(name)
        if before is None or now is None:
            lines.append(f"{name}: {'none before' if before is None else 'none now'}")
        elif before["digest"] != now["digest"]:
            counts = [f"{now[part]:,} {part} (before: {before[part]:,})" for part in ("documents", "tokens")]
            same = ", with other content or in another order" if before["tokens"] == now["tokens"] else ""
            lines.append(f"{name}: {now['files']}: {' of '.join(counts)}{same}")
    if lines:
        raise UserError(
            f"{checkpoints.folder} holds a run on other documents:\n  "
            + "\n  ".join(lines)
            + "\nThe rows (of streamed data: the sizes of the files), the tokenizer or its chat template have changed. Put "
            "them back, choose another output_dir, or set training.allow_changed_data: true to continue with the new documents"
        )
