"""Recognises run folders and finds the results in them."""

from pathlib import Path

from ftjax.config.method import MethodConfig
from ftjax.errors import UserError
from ftjax.hub.adapter.peft import CONFIG as ADAPTER
from ftjax.hub.fetch import HUB

RUN = "config.yaml"  # the file that marks a run folder


def result_of(path: Path) -> tuple[Path, Path] | None:
    """Return `(the folder with the weights, the run's folder)` for a run folder, or its `final/` or `best/`; else None.

    Raises UserError if the run has no result yet.
    """
    for run, result in ((path, path / "final"), (path.parent, path)):
        if (run / RUN).is_file() and is_result(result):
            return result, run
    if not (path / RUN).is_file() or is_result(path):
        return None
    best = path / "best"
    rest = f"take {best}, its best so far" if is_result(best) else "train it to its end first"
    raise UserError(f"{path}: this run has no final/ yet; {rest}")


def refuse_missing(given: str) -> None:
    """Raise UserError for a run that does not exist: `runs/first` looks like a Hub id, but is not one."""
    path = Path(given).expanduser()
    if given.startswith(HUB) or path.exists() or len(path.parts) < 2:
        return
    run = path.parent if path.name in ("final", "best") and len(path.parts) > 2 else path
    if run != path and (run / RUN).is_file():
        other = next((name for name in ("final", "best") if is_result(run / name)), None)
        advice = f"take {run / other}" if other else "train it to its end first"
        raise UserError(f"{given}: this run has no {path.name}/; {advice}")
    beside = sorted(one.parent.name for one in run.parent.glob(f"*/{RUN}"))[:8]
    if beside or path.parts[0] == "runs" or run != path:
        found = f"the runs in {run.parent} are {', '.join(beside)}" if beside else f"{run.parent} holds no run"
        asked = "" if path.is_absolute() else f", looked up from {Path.cwd()}"
        hub = f"; if you mean the Hub's, write {HUB}{given}" if len(path.parts) == 2 and not path.is_absolute() else ""
        raise UserError(f"{given}: there is no such run ({found}{asked}){hub}")


def adapter_folder(path: Path) -> Path:
    """Return the PEFT folder for `path`: a run's result, or the folder itself.

    Raises UserError if a run has no result yet, or its result is a whole model.
    """
    refuse_missing(str(path))
    path = path.expanduser()
    found = None if (path / ADAPTER).is_file() else result_of(path)
    if found is None:
        return path
    if not (found[0] / ADAPTER).is_file():
        raise UserError(f"{path}: this run trained a whole model, not an adapter; give {found[0]} as the model")
    return found[0]


def starting_adapter(method: MethodConfig) -> Path | None:
    """Return the PEFT folder of `method.adapter_path`, which may name a run; None if a run starts without an adapter.

    Raises UserError as `adapter_folder` does.
    """
    given = getattr(method, "adapter_path", None)
    try:
        return None if given is None else adapter_folder(Path(given))
    except UserError as error:
        raise UserError(f"method.adapter_path: {error}") from None


def is_result(folder: Path) -> bool:
    """Return whether the folder holds a model or an adapter."""
    return (folder / ADAPTER).is_file() or (folder / "config.json").is_file()
