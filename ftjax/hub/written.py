"""Describes an exported folder: its files with their sizes, and the tools that load it."""

import json
import re
from collections import defaultdict
from pathlib import Path

from ftjax.hub.adapter.peft import CONFIG as ADAPTER
from ftjax.hub.adapter.peft import adapter_file, method_that_reads, read_adapter_config
from ftjax.hub.adapter.plain_lora import PATTERNS, beyond_plain
from ftjax.hub.gguf.families import FAMILIES as GGUF
from ftjax.models.composite import text_of

SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
HEAD = "ForSequenceClassification"
# Model types with which mlx-lm gives ftjax's tokens (tests/hub/test_mlx.py).
MLX = {
    "gemma", "gemma3_text", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2",
    "qwen3", "qwen3_moe", "smollm3",
}  # fmt: skip


def describe(folder: Path) -> list[str]:
    """Return a few lines about an exported folder."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            sizes[SHARD.sub("-*.", str(file.relative_to(folder)))].append(file.stat().st_size)
    largest = sorted(sizes.items(), key=lambda one: -sum(one[1]))
    count = sum(map(len, sizes.values()))
    shown = [f"{name}{f' ({len(each)} files)' if len(each) > 1 else ''} {readable(sum(each))}" for name, each in largest]
    kind, loads = _adapter(folder) if (folder / ADAPTER).is_file() else _model(folder)
    width = max(map(len, loads)) + 1
    return [
        f"wrote {kind} to {folder}: {count} files, {readable(sum(map(sum, sizes.values())))}",
        f"  {', '.join(shown)}",
        *(f"  {f'{tool}:':{width}} {how}" for tool, how in loads.items()),
    ]


def _model(folder: Path) -> tuple[str, dict[str, str]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name, dtype = (config.get("architectures") or [config["model_type"]])[0], config.get("dtype") or config.get("torch_dtype")
    kind = f"a whole model ({name}, {dtype})"
    if name.endswith(HEAD):
        return kind, {
            "transformers": f"pipeline('text-classification', {str(folder)!r})",
            "ftjax": f"ftjax evaluate {folder} --data FILE",
        }
    return kind, {
        "transformers": f"AutoModelForCausalLM.from_pretrained({str(folder)!r})",
        "vLLM": f"vllm serve {folder}",
        **(
            {"llama.cpp": f"ftjax export {folder} --gguf f16 --out model.gguf"} if text_of(config)["model_type"] in GGUF else {}
        ),
        **({"MLX": f"mlx_lm.generate --model {folder} --prompt TEXT"} if config["model_type"] in MLX else {}),
        "ftjax": f"ftjax generate {folder} --prompt TEXT",
    }


def _adapter(folder: Path) -> tuple[str, dict[str, str]]:
    saved = read_adapter_config(folder)
    method = method_that_reads(folder, saved)
    base = saved.get("base_model_name_or_path") or saved.get("model_name") or "its base model"
    if method.library == "adapters":
        return f"an adapter for {base}", {
            "adapters": f"adapters.init(model); model.load_adapter({str(folder)!r}, use_safetensors=True)",
            "ftjax": f"ftjax generate BASE --adapter {folder} --prompt TEXT",
        }
    loads = {"PEFT": f"PeftModel.from_pretrained(model, {str(folder)!r}), where model is {base}"}
    differing = [name for name in PATTERNS if saved.get(name)]
    if beyond := beyond_plain(method, saved, adapter_file(folder, method).keys()):
        instead = "not at all" if method.no_merge else "only merged (--merge)"
        loads["vLLM, llama.cpp"] = f"{instead}: it has {' and '.join(beyond)}"
    elif differing:
        loads["vLLM, llama.cpp"] = f"only with --portable: vLLM ignores {' and '.join(differing)}"
    else:
        loads["vLLM"] = f"vllm serve BASE --enable-lora --lora-modules tuned={folder}"
        loads["llama.cpp"] = f"ftjax export {folder} --gguf --lora --out adapter.gguf"
    return f"an adapter ({method.kind}) for {base}", loads | {"ftjax": f"ftjax generate BASE --adapter {folder} --prompt TEXT"}


def readable(size: int) -> str:
    """Format a number of bytes: 812 B, 19.6 kB, 2.5 GB."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
