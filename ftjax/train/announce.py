"""Messages of a run before its first update and after its last."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftjax.config import Config
from ftjax.data.pipeline import Split
from ftjax.data.shown import render, show_unit
from ftjax.flops import TrainFlops
from ftjax.hub.adapter.peft import CONFIG as ADAPTER
from ftjax.hub.adapter.peft import read_adapter_config
from ftjax.hub.adapter.plain_lora import PATTERNS
from ftjax.mesh import describe, notes
from ftjax.methods import method_of
from ftjax.models.classifier import MULTI, SINGLE
from ftjax.objectives import encoding_of, generates, head_of
from ftjax.train.progress import say
from ftjax.train.setup import Setup


def announce(setup: Setup, data: Sequence[str], flops: TrainFlops, *, steps: int, epoch_steps: int | None, first: int) -> None:
    """Print the devices, the mesh, what is trained and on what data; called by the first process only.

    Args:
        data: lines that describe the data.
        first: the step that this start resumes from.
    """
    config, options, device = setup.config, setup.config.training, setup.mesh.devices.flat[0]
    what = "answers" if generates(config) else "rows"
    say(
        f"devices: {setup.mesh.size} {device.platform} ({device.device_kind}); mesh: {describe(setup.mesh)}",
        *([f"mesh: auto, because {setup.mesh_reason}"] if setup.mesh_reason else []),
        *(f"mesh: {note}" for note in notes(setup.mesh)),
        *([f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', 'none')}"] if device.platform == "gpu" else []),
        setup.trained_line(),
        flops.formula(config.data.max_length),
        *(f"note: {note}" for note in setup.model.notes),
        *([setup.teacher.line()] if setup.teacher is not None else []),
        *data,
        f"{steps} steps of {options.global_batch_size} {what}{(epoch_steps and f', {epoch_steps} steps per epoch') or ''}; "
        f"remat: {setup.runtime.remat}; attention: {setup.runtime.attention}",
    )


def example_lines(config: Config, split: Split, tokenizer: Any) -> list[str]:
    """Return the first row of data as the model sees it, with the trained tokens marked."""
    [(unit, _)], encoding, head = split.first(1), encoding_of(config), head_of(config)
    first, *others = show_unit(unit, tokenizer, encoding)
    if others or first.caption:
        return [
            f"an example (trained tokens are marked), {first.caption}:", render(first),
            *(line for item in others for line in (f"and {item.caption}, where they part:", render(item, item.parts_at))),
        ]  # fmt: skip
    if (words := encoding.label_text(unit[0])) is not None:
        what = {SINGLE: "class", MULTI: "labels"}.get(head and head.problem_type, "value")
        return ["an example:", tokenizer.decode(unit[0].tokens[:-1].tolist()), f"its {what}: {words}"]
    return ["an example (trained tokens are marked):", render(first)]


def next_commands(folder: Path, config: Config) -> list[str]:
    """Return the commands that use a finished run."""
    final = folder / "final"
    method = method_of(config.method)
    adapter = method.adapter
    if head := head_of(config):
        lines = [f"done; the result is in {final}", f"  measure it: ftjax evaluate {folder} --data FILE"]
        if adapter:
            return [*lines, f"  one model:  ftjax export {folder} --out {folder / 'merged'} --merge"]
        several = "" if head.problem_type == SINGLE else ", top_k=None"
        return [*lines, f"  in Python:  transformers.pipeline('text-classification', {str(final)!r}{several})"]
    merged = folder / "merged" if adapter else final
    lines = [
        f"done; the result is in {final}",
        f"  try it:     ftjax generate {folder} --prompt '...'",
        f"  look at it: ftjax report {folder}",
    ]
    if adapter and method.merged is None:
        load = {
            "peft": "peft.PeftModel.from_pretrained(model, {})",
            "adapters": "adapters.init(model); model.load_adapter({}, use_safetensors=True)",
        }
        return [*lines, f"  in Python:  {load[method.library].format(repr(str(final)))} ({method.no_merge})"]
    if adapter:
        lines += [f"  one model:  ftjax export {folder} --out {merged} --merge", *_portable(folder, final, config)]
    return [
        *lines,
        f"  vLLM:       vllm serve {merged}",
        f"  llama.cpp:  ftjax export {folder} --gguf f16 --out {folder / 'model.gguf'}",
        f"  benchmarks: lm_eval --model hf --model_args pretrained={merged} --tasks hellaswag",
    ]


def _portable(folder: Path, final: Path, config: Config) -> list[str]:
    """Suggest a portable export for a LoRA whose layers differ in rank or scale, which vLLM silently ignores."""
    saved = read_adapter_config(final) if (final / ADAPTER).is_file() else config.method.model_dump()  # it may be a folder's
    differing = [name for name in PATTERNS if saved.get(name)]
    beyond = saved.get("use_dora") or saved.get("modules_to_save") or saved.get("trainable_token_indices")
    if not differing or beyond or saved.get("bias", "none") != "none":
        return []
    return [
        f"  LoRA alone: ftjax export {folder} --out {folder / 'portable'} --portable (vLLM ignores {' and '.join(differing)})"
    ]
