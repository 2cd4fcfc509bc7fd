"""Locates a model's files: a local folder, a .gguf file, or this machine's Hub cache."""

import os
import re
from pathlib import Path

from ftjax.errors import UserError

# The top level of a repository only: subfolders hold the same weights for other runtimes.
CONFIGURATION = ("*.json", "tokenizer*", "*.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt", "README.md")
SINGLE, WEIGHTS = "model.safetensors", "model*.safetensors"
NOT_THESE = ("*/*",)
HUB = "https://huggingface.co/"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")


def resolve_model(path: str, revision: str | None = None) -> Path:
    """Return the folder or .gguf file of a model; a Hub model is downloaded into the Hub's cache first.

    Args:
        path: a local folder in Hugging Face layout, a .gguf file, a Hub id or a repository's address.
        revision: branch, tag or commit, for a Hub id only.

    Raises UserError if there is no such model, it cannot be reached, or its weights are pickled.
    """
    local = _local(path, revision)
    if local is not None and local.is_file():
        return local
    folder = local if local is not None else _download(path, revision, (*CONFIGURATION, WEIGHTS))
    if not any(folder.glob(WEIGHTS)) and not (folder / f"{SINGLE}.index.json").exists():
        raise UserError(f"{path}: {_no_weights(folder, None if local is not None else path, revision)}")
    return folder


def resolve_tokenizer(path: str, revision: str | None = None) -> Path:
    """Return the same as `resolve_model`, without downloading weights."""
    local = _local(path, revision)
    return local if local is not None else _download(path, revision, CONFIGURATION)


def resolve_config(path: str, revision: str | None = None) -> Path:
    """Return the same as `resolve_model`, downloading only config.json of a folder."""
    local = _local(path, revision)
    return local if local is not None else _download(path, revision, ("config.json",))


def _local(path: str, revision: str | None) -> Path | None:
    """Return the local file or folder for `path`; None for a Hub id."""
    if path.startswith(HUB):
        return None
    location = Path(path).expanduser()
    if location.exists():
        if revision is not None:
            raise UserError(f"{path}: model.revision is of Hub ids only, and this is a local path; remove revision: {revision}")
        if location.is_file() and location.suffix != ".gguf":
            raise UserError(
                f"{path}: expected a folder or a .gguf file; found another file. Give the folder that holds "
                f"config.json: {location.parent}"
            )
        return location
    parts = location.parts
    looks_local = (
        location.is_absolute()
        or path.startswith((".", "~"))
        or path.endswith((os.sep, ".gguf", ".safetensors", ".json"))
        or "\\" in path
        or (len(parts) == 2 and Path(parts[0]).is_dir())  # `runs/tiny` if there is a folder `runs`
        or not HUB_ID.fullmatch(path)
    )
    if not looks_local:
        return None
    parent = location.parent
    beside = sorted(p.name for p in parent.iterdir())[:8] if parent.is_dir() else []
    found = f"{parent} holds {', '.join(beside) or 'nothing'}" if parent.is_dir() else f"{parent} is missing"
    hint = f"; if you mean the Hub's, write {HUB}{path}" if HUB_ID.fullmatch(path) and len(parts) == 2 else ""
    raise UserError(f"{path}: no such file or folder ({found}){hint}")


def _download(path: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo = path.removeprefix(HUB).strip("/")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(NOT_THESE)))
    except GatedRepoError:
        problem = f"the Hub gives it to those who accept its terms: open {HUB}{repo}, accept them, then run `hf auth login`"
    except RepositoryNotFoundError:
        problem = (
            f"neither a local folder nor a repository that the Hub shows you. Check the name at {HUB}{repo}; for a private "
            "one run `hf auth login` or set HF_TOKEN"
        )
    except RevisionNotFoundError:
        problem = f"the repository has no branch, tag or commit {revision!r}; see {HUB}{repo}/commits/main"
    except HFValidationError as error:
        problem = f"neither a local folder nor a Hub id ({error})"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        switched_off = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if switched_off else "the Hub cannot be reached"
        problem = (
            f"no such local folder, {why}, and no complete copy is in the Hub's cache. Connect and try again, or download it "
            f"elsewhere with `hf download {repo} --local-dir FOLDER`, bring the folder here and give its path"
        )
    except HfHubHTTPError as error:
        problem = f"the Hub answered {error.response.status_code}: {error.server_message or error}"
    except OSError as error:
        problem = f"the download failed: {error}"
    raise UserError(f"{path}: {problem}")


def _no_weights(folder: Path, repo: str | None, revision: str | None) -> str:
    """Explain why a folder without safetensors cannot be used, and what to do."""
    names = _remote_names(repo, revision) if repo else [p.name for p in folder.iterdir()]
    shown = ", ".join(sorted(names)[:10]) or "nothing"
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    quantised = sorted(name for name in names if name.endswith(".gguf"))
    if "adapter_config.json" in names:
        return (
            "this is an adapter, not a model. Give its base model as model.path, and this as method.adapter_path "
            "(or --adapter to generate)"
        )
    if quantised:
        where = f"download it with `hf download {repo} {quantised[0]}` and give its path" if repo else "give the file itself"
        return f"it holds GGUF files ({', '.join(quantised[:4])}); {where}"
    if pickled:
        return (
            f"its weights are only in {pickled[0]}, a format that can run code when it is loaded, so ftjax does not read it. "
            "Convert it where you trust it, with transformers and PyTorch: "
            "AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_FOLDER) writes model.safetensors"
        )
    return f"expected {SINGLE} (or its index and shards); found {shown}"


def _remote_names(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().list_repo_files(repo.removeprefix(HUB).strip("/"), revision=revision)
    except (HfHubHTTPError, OSError):  # only the downloaded files are known then
        return []
