"""`ftjax doctor`: reports installed packages, devices and missing parts."""

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from ftjax.version import __version__

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"  # exists in a checkout, not in an installed wheel
_GIB = 2**30


@dataclass
class Package:
    """One dependency. `tested` is the version used by the test suite, None if unknown."""

    name: str
    needed: str
    installed: str | None
    tested: str | None
    extra: str | None = None

    @property
    def state(self) -> str:
        if self.installed is None:
            return "missing" if self.extra is None else "not installed"
        if self.needed and self.installed not in Requirement(f"{self.name}{self.needed}").specifier:
            return "too old" if self.extra is None else "other version"
        if self.tested is None:
            return "ok"
        return "ok, tested" if self.installed == self.tested else "ok, untested"


@dataclass
class Report:
    """The findings of `ftjax doctor`. Nothing works without what `missing` lists; `hints` say what to do."""

    ftjax: str
    python: str
    system: str
    packages: list[Package] = field(default_factory=list)
    devices: list[dict[str, Any]] = field(default_factory=list)
    memory_gib: float | None = None
    folders: list[dict[str, Any]] = field(default_factory=list)
    hub_token: bool = False
    missing: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def examine(constraints: Path = CONSTRAINTS) -> Report:
    """Inspect the machine; change, download or send nothing."""
    report = Report(__version__, platform.python_version(), f"{platform.system()} {platform.machine()}")
    report.packages = list(_packages(_pins(constraints)))
    for package in report.packages:
        if package.state in ("missing", "too old"):
            report.missing.append(f"{package.name}{package.needed} (found {package.installed or 'none'})")
    if report.missing:
        report.hints.append("install what is missing with: pip install -c constraints.txt ftjax")
    report.memory_gib = _memory()
    _devices(report)
    report.folders = list(_folders())
    report.hub_token = _has_token()
    if not report.hub_token:
        report.hints.append("no Hugging Face token: private and gated models need `hf auth login` or HF_TOKEN")
    return report


def _pins(path: Path) -> dict[str, str]:
    """Return the versions of a constraints file by normalised name, without lines whose marker excludes this Python."""
    pins: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                requirement = Requirement(line.split("#")[0].strip())
            except InvalidRequirement:
                continue  # a comment or an empty line
            version = re.search(r"==\s*([^,;\s]+)", str(requirement.specifier))
            if version and (requirement.marker is None or requirement.marker.evaluate()):
                pins[_normal(requirement.name)] = version[1]
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _packages(pins: dict[str, str]) -> Iterator[Package]:
    seen = set()
    for line in metadata.requires("ftjax") or []:
        requirement = Requirement(line)
        extra = next(iter(re.findall(r"extra == ['\"]([^'\"]+)", line)), None)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra or ""}):
            continue
        name = "libtpu" if extra == "tpu" else f"jax-{extra}13-plugin" if extra == "cuda" else requirement.name
        if name in seen:
            continue
        seen.add(name)
        needed = "" if name != requirement.name else str(requirement.specifier)
        yield Package(name, needed, _version(name), pins.get(_normal(name)), extra)
    yield Package("jaxlib", "", _version("jaxlib"), pins.get("jaxlib"))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _devices(report: Report) -> None:
    try:
        import jax

        devices = jax.local_devices()
    except Exception as error:  # a broken plugin may raise anything, and this command reports it
        report.missing.append(
            f"a working jax backend ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
        return
    for device in devices:
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        report.devices.append(
            {
                "id": device.id,
                "platform": device.platform,
                "kind": device.device_kind,
                "memory_gib": round(limit / _GIB, 1) if limit else None,
            }
        )
    used = {device.platform for device in devices}
    if _has_nvidia() and "gpu" not in used and "cuda" not in used:
        report.hints.append("there is an NVIDIA GPU that jax does not see: pip install 'ftjax[cuda]'")
    if _has_tpu() and "tpu" not in used:
        report.hints.append("there is a TPU that jax does not see: pip install 'ftjax[tpu]'")
    if used == {"cpu"} and os.environ.get("JAX_PLATFORMS"):
        report.hints.append(f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} limits jax to these platforms")


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def _has_tpu() -> bool:
    """Return whether a device has Google's PCI vendor id, on a machine with the device files of a TPU VM."""
    if not (Path("/dev/accel0").exists() or Path("/dev/vfio").exists()):
        return False
    return any(file.read_text().strip() == "0x1ae0" for file in Path("/sys/bus/pci/devices").glob("*/vendor"))


def _folders() -> Iterator[dict[str, Any]]:
    try:
        from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
    except ImportError:
        return
    places = {
        "Hub cache": HF_HUB_CACHE,
        "data sets": os.environ.get("HF_DATASETS_CACHE", str(Path(HF_HOME) / "datasets")),
        "compiled": _compiled(),
        "working": os.getcwd(),
    }
    for what, place in places.items():
        if place is None:
            continue
        path = Path(place).expanduser()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        yield {
            "what": what,
            "path": str(path),
            "exists": path.exists(),
            "writable": os.access(there, os.W_OK),
            "free_gib": round(shutil.disk_usage(there).free / _GIB, 1),
        }


def _compiled() -> str | None:
    """Return the folder of a run's compiled programs."""
    try:
        import jax

        from ftjax.compile_cache import keep_compiled_programs
    except ImportError:
        return None
    keep_compiled_programs()
    return jax.config.jax_compilation_cache_dir


def _has_token() -> bool:
    try:
        from huggingface_hub import get_token
    except ImportError:
        return False
    return get_token() is not None


def show(report: Report, *, as_json: bool) -> None:
    """Print the report as text or as one JSON object."""
    if as_json:
        packages = [{**asdict(package), "state": package.state} for package in report.packages]
        print(json.dumps({**asdict(report), "packages": packages}, indent=2))
        return
    from rich.text import Text

    from ftjax.console import make_console, print_table, say

    console = make_console()
    memory = f", {report.memory_gib} GiB memory" if report.memory_gib else ""
    say(console, f"ftjax {report.ftjax} on Python {report.python}, {report.system}, {os.cpu_count()} CPU cores{memory}\n")
    head, rows = ("package", "installed", "needed", "tested with", "extra", ""), []
    for package in report.packages:
        colour = {"missing": "red", "too old": "red", "ok, tested": "green", "ok": "green", "ok, untested": "yellow"}.get(
            package.state, "dim"
        )
        rows.append(
            (
                package.name, package.installed or "-", package.needed, package.tested or "-", package.extra or "",
                Text(package.state, colour),
            )
        )  # fmt: skip
    print_table(console, head, rows, left=range(len(head)))
    say(console)
    kinds: dict[tuple[str, str, float | None], int] = {}
    for device in report.devices:
        key = (device["platform"], device["kind"], device["memory_gib"])
        kinds[key] = kinds.get(key, 0) + 1
    for (name, kind, size), count in kinds.items():
        say(console, f"devices: {count} x {name} ({kind}){f', {size} GiB each' if size else ''}")
    for folder in report.folders:
        line = Text(f"{folder['what']}: {folder['path']}, {folder['free_gib']} GiB free")
        line.append("" if folder["writable"] else ", not writable", "red")
        line.append("" if folder["exists"] else ", not there yet")
        say(console, line)
    say(console, f"Hugging Face token: {'present' if report.hub_token else 'absent'}")
    for hint in report.hints:
        say(console, f"hint: {hint}")
    for thing in report.missing:
        say(console, Text.assemble(("missing", "bold red"), f": {thing}"))
    if not report.missing:
        say(console, "nothing required is missing", "green")
