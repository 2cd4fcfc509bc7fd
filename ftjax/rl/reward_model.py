"""A reward model: a folder with a classification head of one output, as `objective: {name: reward}` writes it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax

from ftjax.config import MeshConfig
from ftjax.config.data import DataConfig
from ftjax.data.scored import Scored
from ftjax.errors import UserError
from ftjax.evaluate.likelihood import encode_units, head_scores
from ftjax.generate.named import LoadOptions, find_named
from ftjax.generate.session import Generator
from ftjax.mesh import make_mesh
from ftjax.models.classifier import classes_of
from ftjax.rl.rollout import Rollout


class RewardModel:
    """The score of each conversation, read at its last token. The model is loaded at the first call, on one device."""

    def __init__(self, folder: str, *, dtype: str = "auto", batch_size: int = 16):
        """Args: folder: a model, an adapter, or a run."""
        self._named, self._dtype, self._batch_size = find_named(folder), dtype, batch_size
        self._generator: Generator | None = None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        generator = self._generator or self._load()
        examples = [one.conversation for one in rollouts]
        pairs = [replace(example, rejected=example) for example in examples]  # documents of rewards come in pairs
        units = encode_units(pairs, generator.tokenizer, DataConfig(train="-"), Scored())
        texts = [unit[0].tokens[:-1].tolist() for unit in units]
        for text, rollout in zip(texts, rollouts, strict=True):
            if len(text) > generator.context:
                raise UserError(
                    f"{rollout.item.where}: prompt and answer have {len(text)} tokens, and the context of "
                    f"{self._named.name} is {generator.context}"
                )
        return head_scores(generator, texts, 1, self._batch_size)[:, 0].tolist()

    def _load(self) -> Generator:
        named, mesh = self._named, make_mesh(MeshConfig(), jax.local_devices()[:1])
        adapter = None if named.adapter is None else Path(named.adapter)
        generator = Generator(named.model, adapter, dtype=self._dtype, mesh=mesh, **named.options(LoadOptions()))
        if len(classes := classes_of(generator.model.config) or ()) != 1:
            what = f"a head of {len(classes)} outputs" if classes else "no classification head"
            raise UserError(f"{named.name}: a reward model has a head of one output, and this model has {what}")
        self._generator = generator
        return generator
