"""The settings of a GGUF file, each of which is used or refused."""

from typing import Any

from ftjax.errors import UserError
from ftjax.hub.gguf.file import GGUFFile
from ftjax.hub.gguf.settings import WINDOW

# Settings of other architectures that llama.cpp's converter writes with neutral values.
WITHOUT_EFFECT = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.layer_norm_epsilon": None, WINDOW: 0,
}  # fmt: skip


class Settings:
    """The settings of a file under its architecture's name, each to be taken once."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.path, self.start, self.tensors = file.path, f"{architecture}.", file.tensors
        length = len(self.start)
        self.left = {key[length:]: value for key, value in file.metadata.items() if key.startswith(self.start)}

    def take(self, key: str, *default: Any) -> Any:
        """Return a setting that is the same for all layers."""
        if key in self.left:
            value = self.left.pop(key)
            if isinstance(value, list) and len(set(value)) != 1:
                raise UserError(
                    f"{self.path}: {self.start}{key} differs from layer to layer, which a Hugging Face configuration of this "
                    f"model cannot express: {value}"
                )
            return value[0] if isinstance(value, list) else value
        if default:
            return default[0]
        lacks = f"the file lacks {self.start}{key}"
        raise UserError(f"{self.path}: {lacks}; it is damaged or was not made by llama.cpp's converter")

    def take_each(self, key: str, layers: int) -> list[Any]:
        """Return a setting of each layer."""
        value = self.left.pop(key) if key in self.left else self.take(key)
        each = value if isinstance(value, list) else [value] * layers
        if len(each) < layers:
            raise UserError(f"{self.path}: {self.start}{key} has {len(each)} values for {layers} layers; the file is damaged")
        return each[:layers]

    def finish(self) -> None:
        """Raise UserError for settings that nobody took, unless they have no effect."""
        unknown = {
            key: value
            for key, value in self.left.items()
            if key != "tensor_data_layout" and not (key in WITHOUT_EFFECT and WITHOUT_EFFECT[key] in (None, value)) and value
        }
        if unknown:
            found = ", ".join(f"{self.start}{key} = {value}" for key, value in sorted(unknown.items()))
            raise UserError(
                f"{self.path}: settings that ftjax does not know: {found}. Use the model's Hugging Face folder instead"
            )
