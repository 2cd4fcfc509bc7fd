"""The adapters of a server: named voices beside the base model, at the start and by request."""

import copy
import threading
from pathlib import Path

from ftjax.config import ModelConfig
from ftjax.errors import UserError
from ftjax.generate.adapters import AdapterStack
from ftjax.generate.session import Generator
from ftjax.hub.run_folder import adapter_folder
from ftjax.hub.tokenizer.ends import end_ids
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.serve.errors import ApiError, invalid
from ftjax.serve.served import Served, Voice


class Adapters:
    """Loads and unloads adapters while the server answers; nothing is compiled, and rows that run are not disturbed.

    Attributes:
        root: the folder that requests may load from; None: they may load nothing.
    """

    def __init__(self, stack: AdapterStack, served: Served, root: Path | None):
        self.stack, self.served = stack, served
        self.root = None if root is None else root.resolve()
        self._lock = threading.Lock()
        self._spaces = 0

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter folder or a run under a name. Raises UserError if it cannot be served."""
        with self._lock:
            self._add(name, folder)

    def load(self, name: str, path: str) -> None:
        """Load by request: `path` is below `root`. Raises ApiError."""
        try:
            where = (self.root / path).resolve()
            there = where.is_relative_to(self.root) and where.is_dir()
        except (OSError, ValueError):  # a name that no file can have
            there = False
        if not there:
            raise invalid(f"lora_path: {path!r} is not a folder below the server's --adapter-root", "lora_path")
        with self._lock:
            if name in self.served.voices:
                raise invalid(f"lora_name: {name!r} is there already; unload it first", "lora_name")
            try:
                self._add(name, where)
            except UserError as error:
                raise invalid(str(error), "lora_path") from None

    def unload(self, name: str) -> None:
        """Unload by request; requests that run go on to their end. Raises ApiError if there is no such adapter."""
        with self._lock:
            voice = self.served.voices.get(name)
            if voice is None or not voice.adapter:
                raise ApiError(404, f"there is no adapter {name!r}", "lora_name", "model_not_found")
            del self.served.voices[name]

    def _add(self, name: str, folder: Path) -> None:
        folder = adapter_folder(folder)
        arrays = self.stack.read(folder)
        place = self._free_place()
        self._spaces += 1
        engine = self.served.engine
        filled = engine.call(lambda: self.stack.fill(place, arrays))
        filled.result()
        voice = Voice(name, speaker(self.served.generator, folder), place, self._spaces)
        self.served.voices = {**self.served.voices, name: voice}

    def _free_place(self) -> int:
        """Return a place that no voice and no request uses. Raises UserError if there is none."""
        used = {voice.adapter for voice in self.served.voices.values()} | {job.adapter for job in self.served.engine.jobs}
        free = sorted(set(range(1, self.stack.places + 1)) - used)
        if not free:
            raise UserError(f"all {self.stack.places} places for adapters are taken; unload one (--max-adapters at the start)")
        return free[0]


def speaker(generator: Generator, folder: Path) -> Generator:
    """Return the generator with the tokenizer of an adapter folder, if it has one: its chat template may differ."""
    if not (folder / "tokenizer_config.json").is_file():
        return generator
    made = copy.copy(generator)
    made.tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    made.ends = end_ids(made.model.config, made.settings, made.tokenizer)
    return made
