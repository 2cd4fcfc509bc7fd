"""`ftjax serve`: load a model and its adapters, compile, and answer requests over HTTP."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from ftjax.console import make_console, say
from ftjax.errors import UserError
from ftjax.generate.adapters import AdapterStack, updates_of
from ftjax.generate.named import LoadOptions, Named, find_named
from ftjax.generate.open import mesh_of
from ftjax.generate.paged import PagedBatch, Room
from ftjax.generate.scheduler import Scheduler
from ftjax.generate.session import Generator
from ftjax.hub.fetch import resolve_config
from ftjax.hub.load import read_hf_config
from ftjax.hub.run_folder import adapter_folder
from ftjax.long_steps import long_step
from ftjax.models.classifier import classes_of

ROWS = 16
LONGEST = 8192  # the context, unless another is asked for or the model's is shorter
SHARE = 0.8  # of a device's free memory is for the cache
ON_HOST = 4 << 30  # bytes for the cache where devices do not say what they have


@dataclass(frozen=True)
class ServeOptions:
    """How to serve.

    Attributes:
        name: the model's name in requests; None takes the last part of its path.
        api_key_file: a file with one key per line, one of which each request must have; None asks for none.
        max_requests: the most requests that run or wait.
        rows: the most requests that run at the same time.
        context: the most tokens of a prompt and its answer; None takes the model's, up to LONGEST.
        cache_gb: memory for keys and values on each device; None takes SHARE of what is free.
        mesh: sizes of the mesh's axes, such as `{"tensor": 4}`; empty uses one device.
        adapters: `(name, folder)`.
        adapter_root: a folder whose adapters may be loaded by request; None allows none.
        max_adapters: the most adapters at a time.
        max_rank: the largest rank of adapters that are loaded by request.
    """

    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    max_requests: int = 256
    rows: int = ROWS
    context: int | None = None
    cache_gb: float | None = None
    mesh: Mapping[str, int] = ()
    adapters: Sequence[tuple[str, Path]] = ()
    adapter_root: Path | None = None
    max_adapters: int = 8
    max_rank: int = 64


def serve(model: str, loading: LoadOptions, options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises UserError for what cannot be served."""
    try:
        from ftjax.serve.app import make_app
        from ftjax.serve.server import bound, run
    except ImportError as error:
        raise UserError(f"ftjax serve needs {error.name}, which is not installed: pip install 'ftjax[serve]'") from None
    keys = read_keys(options.api_key_file)
    if options.adapter_root is not None and not options.adapter_root.is_dir():
        raise UserError(f"--adapter-root {options.adapter_root}: not a folder")
    with bound(options.host, options.port) as listening:
        served, engine, adapters = _ready(model, loading, options, f"http://{options.host}:{options.port}")
        app = make_app(served, engine, keys=keys, adapters=adapters)
        run(app, engine, listening)


def _ready(model: str, loading: LoadOptions, options: ServeOptions, address: str) -> tuple[Any, Any, Any]:
    """Load and compile; return the `Served` model, its `EngineThread`, which runs, and the `Adapters` that requests may change,
    or None."""
    from ftjax.compile_cache import keep_compiled_programs
    from ftjax.serve.adapters import Adapters
    from ftjax.serve.schedule import EngineThread
    from ftjax.serve.served import Served

    keep_compiled_programs()
    console = make_console(stderr=True)
    found = find_named(model, adapter=loading.adapter)
    several = list(options.adapters)
    if several and found.adapter is not None:
        raise UserError(f"{model} is an adapter itself; give its base model, {found.model}, and each adapter as NAME=DIR")
    with long_step(f"loading {found.name}"):
        generator, stack = load(found, loading, options)
    if classes_of(generator.model.config):
        raise UserError("the model has a classification head and generates no text; use ftjax evaluate for its predictions")
    batch = make_batch(generator, options)
    began = time.monotonic()
    batch.warm_up()
    engine = EngineThread(Scheduler(batch), options.max_requests)
    served = Served(generator, engine, options.name or name_of(found))
    room = batch.room
    say(
        console,
        f"{served.name}: {room.rows} rows, {served.context} tokens of context, {room.pages} pages of {room.page} tokens"
        f"{'' if batch.sizes.groups == 1 else ' on each shard'}; compiled in {time.monotonic() - began:.0f} s",
    )
    say(console, f"attention: {generator.engine.attention}")
    engine.start()
    adapters = None
    if stack is not None:
        adapters = Adapters(stack, served, options.adapter_root)
        for name, folder in several:
            if name == served.name:
                raise UserError(f"--adapter {name}=...: the base model has this name; choose another, or another --name")
            adapters.add(name, folder)
            say(console, f"{name}: {folder}")
    say(console, f"{address} (a page to chat), {address}/v1 (API)")
    return served, engine, adapters if options.adapter_root is not None else None


def load(found: Named, loading: LoadOptions, options: ServeOptions) -> tuple[Generator, AdapterStack | None]:
    """Load the model, with room for adapters if it is to have any. Raises UserError for what cannot be loaded."""
    mesh, own = mesh_of(options.mesh), found.options(loading)
    if not options.adapters and options.adapter_root is None:
        return Generator(found.model, found.adapter, dtype=loading.dtype, mesh=mesh, **own), None
    if found.adapter is not None:
        raise UserError(f"{found.name} is an adapter; give its base model, {found.model}, to load others beside it")
    folders = [adapter_folder(folder) for _, folder in options.adapters]
    config = read_hf_config(resolve_config(found.model, own["revision"]))
    rank, wanted = updates_of(folders, config)
    places = max(options.max_adapters if options.adapter_root is not None else 0, len(folders))
    if options.adapter_root is not None:
        rank, updated = max(rank, options.max_rank), wanted
        wanted = lambda name: updated(name) or not name.endswith(("lm_head", "embed_out"))  # noqa: E731
    stack = AdapterStack.load(found.model, places=places, rank=rank, wanted=wanted, dtype=loading.dtype, mesh=mesh, **own)
    stack.fill(1, None)  # compiles
    return stack.generator, stack


def named_adapters(given: Sequence[str]) -> tuple[Path | None, list[tuple[str, Path]]]:
    """Return the one adapter that is given without a name, or None, and those with names. Raises UserError for two of one name,
    and for both kinds together."""
    named = [(one.partition("=")[0], Path(one.partition("=")[2])) for one in given if "=" in one]
    plain = [Path(one) for one in given if "=" not in one]
    names = [name for name, _ in named]
    if len(plain) > 1 or (plain and named):
        raise UserError("--adapter: to serve several adapters, give each a name: --adapter NAME=DIR")
    if twice := sorted({name for name in names if names.count(name) > 1 or not name}):
        raise UserError(f"--adapter {twice[0]!r}: expected a name of its own for each adapter")
    return (plain[0] if plain else None), named


def sizes_of(given: Sequence[str]) -> dict[str, int]:
    """Return `{"tensor": 4}` for `tensor=4`. Raises UserError for anything else."""
    sizes = {}
    for one in given:
        axis, _, size = one.partition("=")
        if not size.isdecimal() or not int(size):
            raise UserError(f"--mesh {one}: expected AXIS=SIZE, such as tensor=4")
        sizes[axis] = int(size)
    return sizes


def read_keys(path: Path | None) -> list[str]:
    """Return the API keys in a file, one per line. Raises UserError if there are none."""
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path}: cannot be read: {error}") from None
    if not keys:
        raise UserError(f"--api-key-file {path}: expected a key per line; found none")
    return keys


def name_of(found: Named) -> str:
    """Return the name that requests use: that of the run or of the folder, or a Hub id as a whole."""
    if found.run is not None:
        return found.run.resolve().name
    path = Path(found.model if found.adapter is None else found.adapter)
    return path.resolve().name if path.exists() else str(path)


def make_batch(generator: Generator, options: ServeOptions) -> PagedBatch:
    """Return the engine, sized to the options or to what the device has. Raises UserError if a text does not fit."""
    context = options.context or min(generator.context, LONGEST)
    if context > generator.context:
        raise UserError(f"--context {context}: the model's context is {generator.context}")
    engine = generator.engine
    memory = free_memory(engine.mesh) if options.cache_gb is None else int(options.cache_gb * 1e9)
    room = Room.fit(engine, rows=options.rows, context=context, memory=memory, page=min(32, context))
    if engine.on_one_cpu:  # elsewhere a step reads all weights, for however many rows, and takes as long
        room = replace(room, few=tuple(size for size in (1, 4) if 2 * size <= options.rows))
    return PagedBatch(engine, generator.params, room)


def free_memory(mesh: Any) -> int:
    """Return the bytes that the cache may take on each device of the mesh."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    free = [one["bytes_limit"] - one["bytes_in_use"] for one in stats if "bytes_limit" in one]
    return int(SHARE * min(free)) if free else ON_HOST // len(jax.local_devices())
