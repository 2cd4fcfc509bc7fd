"""`ftjax merge-adapters`: combines LoRAs into one, a weighted sum of their updates to the base model's weights.

The sum of `w_i B_i A_i` is one product of concatenated matrices, `[w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]`, whose rank is
the sum of the ranks. It is exact, like PEFT's `add_weighted_adapter` with `combination_type="cat"`. Summing the As and the
Bs separately ("linear") gives a different update, and seldom the intended one.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ftjax.errors import UserError
from ftjax.hub.adapter.own_base import known_base
from ftjax.hub.adapter.peft import CONFIG, WEIGHTS
from ftjax.hub.adapter.plain_lora import Update, read_updates, targets, write_plain
from ftjax.hub.output import refuse_what_is_there, replacing
from ftjax.hub.run_folder import adapter_folder

SAME = ("base_model_name_or_path", "fan_in_fan_out", "task_type")  # keys that adapters of one base model share


def merge_adapters(parts: Sequence[tuple[Path, float]], out: Path) -> None:
    """Write the weighted sum of LoRA folders; tokenizer and chat template come from the first.

    Raises UserError if a folder holds more than LoRA, or the folders are of different base models.
    """
    if len(parts) < 2:
        raise UserError("merge-adapters: expected two adapters or more, as FOLDER=WEIGHT; to scale one, name it twice")
    refuse_what_is_there(out, "merge-adapters")
    read = [read_updates(folder, "only the updates of LoRA add up exactly") for folder, _ in parts]
    first = read[0][0]
    for (folder, _), (saved, updates) in zip(parts, read, strict=True):
        for key in SAME:
            if saved.get(key) != first.get(key):
                raise UserError(
                    f"merge-adapters: {parts[0][0]} has {key} = {first.get(key)!r} and {folder} has {saved.get(key)!r}; "
                    f"adapters of different models do not add up. If it is one model, write the same name into {CONFIG}"
                )
        bases = known_base(parts[0][0]), known_base(folder)
        if None not in bases and bases[0] != bases[1]:
            raise UserError(
                f"merge-adapters: {parts[0][0]} and {folder} were made on models with other weights (base_model.json); "
                "adapters of different models do not add up"
            )
        for module, update in updates.items():
            other = read[0][1].get(module, update)
            if (other.a.shape[1], other.b.shape[0]) != (update.a.shape[1], update.b.shape[0]):
                raise UserError(
                    f"merge-adapters: {module} is {other.b.shape[0]} x {other.a.shape[1]} in {parts[0][0]} and "
                    f"{update.b.shape[0]} x {update.a.shape[1]} in {folder}; these are adapters of different models"
                )
    modules = dict.fromkeys(module for _, updates in read for module in updates)
    combined = {}
    for module in modules:
        mine = [(updates[module], weight) for (_, updates), (_, weight) in zip(read, parts, strict=True) if module in updates]
        a = np.concatenate([update.a.astype(np.float32) for update, _ in mine])
        b = np.concatenate([update.b.astype(np.float32) * np.float32(weight) for update, weight in mine], axis=1)
        combined[module] = Update(a, b)
    alike = all(updates.keys() == combined.keys() for _, updates in read)
    names = targets(first, combined) if alike else sorted(combined)
    with replacing(out) as folder:
        write_plain(folder, first, combined, names)
        for path in parts[0][0].iterdir():
            if path.is_file() and path.name not in (CONFIG, WEIGHTS, "README.md"):
                shutil.copyfile(path, folder / path.name)


def parse(given: Sequence[str]) -> list[tuple[Path, float]]:
    """Parse each `FOLDER=WEIGHT`, of an adapter or a run. Raises UserError if the weight is not a number."""
    found = []
    for one in given:
        folder, equals, weight = one.rpartition("=")
        try:
            found.append((adapter_folder(Path(folder)), float(weight)))
        except ValueError:
            equals = ""
        if not equals or not np.isfinite(found[-1][1]):
            raise UserError(f"merge-adapters: {one!r}: expected FOLDER=WEIGHT, such as runs/a/final=0.7")
    return found
