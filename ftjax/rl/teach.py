"""`ftjax teach`: predictions of a teacher that runs here (`ftjax.train.teach`), or behind an address.

A server with OpenAI's interface of completions scores the documents as they are: each is sent as token ids, with `echo` and
`logprobs`, and the one token that is generated is not used. The server has to name likely tokens by their ids, as vLLM does.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ftjax.config import Config
from ftjax.config.distill import DistillConfig
from ftjax.data.encoder import Encoded
from ftjax.data.pipeline import PackedSplit, load_splits
from ftjax.errors import UserError
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.vocabulary import embeddings_of
from ftjax.objectives import encoding_of
from ftjax.rl.post import post
from ftjax.train import teach as here
from ftjax.train.teach import Rows, write

PARALLEL = 8  # requests at a time
DOCUMENTS = 256  # whose predictions are written at a time
TIMEOUT = 600.0  # seconds of a request
LEAST = 1e-9  # of the probability of all other ids together
ALIKE = 0.75  # least share of tokens whose text the server has alike
ID = "token_id:"  # before an id that takes the place of a token's text (vLLM)


def teach(config: Config) -> list[Path]:
    """Write the predictions of the teacher of a configuration; return the files.

    Raises UserError for anything wrong in the configuration, the teacher or the data.
    """
    section = config.objective
    if not isinstance(section, DistillConfig) or section.teacher_model_server_url is None:
        return here.teach(config)
    if jax.process_count() > 1:
        raise UserError("ftjax teach asks a server from one process; start it on one host")
    tokenizer = load_tokenizer(config.model)
    splits = load_splits(config.data, tokenizer, seed=config.training.seed, encoding=encoding_of(config))
    where = {"server": section.teacher_model_server_url, "model": section.teacher_model_name_or_path}
    facts = {"teacher": where, "temperature": section.temperature, "vocabulary": embeddings_of(config)}
    return write(config, splits, facts, lambda: ServerRows(section, tokenizer, facts["vocabulary"]))


class ServerRows:
    """Asks a server to score documents."""

    def __init__(self, section: DistillConfig, tokenizer: Any, vocabulary: int):
        """Args: vocabulary: ids that count; further ones pad the teacher's."""
        self._tokenizer, self._top, self._vocabulary = tokenizer, section.loss_top_k, vocabulary
        self._address = f"{section.teacher_model_server_url.rstrip('/')}/completions"
        self._asked = {
            "model": section.teacher_model_name_or_path, "echo": True, "max_tokens": 1, "temperature": 0, "logprobs": self._top,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip

    def __call__(self, split: PackedSplit) -> Iterator[Rows]:
        """Yield the predictions for all chosen documents of a data set."""
        self._compare(split.documents.document(split.chosen[0]))
        with ThreadPoolExecutor(PARALLEL, "teacher") as pool:
            for start in range(0, len(split.chosen), DOCUMENTS):
                found = pool.map(partial(self._of, split), split.chosen[start : start + DOCUMENTS].tolist())
                yield Rows(*map(np.concatenate, zip(*found, strict=True)))

    def _compare(self, document: Encoded) -> None:
        """Raise UserError if the server has other texts for the tokens of a document: it has another tokenizer."""
        ids = document.tokens.tolist()
        texts = self._ask({"prompt": ids, "return_tokens_as_token_ids": False}, lambda found: found["tokens"][: len(ids)])
        own = [self._tokenizer.decode([one]) for one in ids]
        pairs = [(a.strip(), b.strip()) for a, b in zip(own, texts, strict=True)]
        pairs = [pair for pair in pairs if "\ufffd" not in "".join(pair)]  # parts of characters tell nothing
        unlike = [pair for pair in pairs if pair[0] != pair[1]]
        if len(unlike) > (1 - ALIKE) * len(pairs):
            raise UserError(
                f"{self._address}: the teacher has another tokenizer than the student: {unlike[0][0]!r} is {unlike[0][1]!r} "
                f"there, and {len(unlike)} of {len(pairs)} tokens differ. Choose a teacher with the same tokenizer"
            )

    def _of(self, split: PackedSplit, place: int) -> Rows:
        document = split.documents.document(place)
        ids, places = document.tokens.tolist(), np.flatnonzero(document.weights[1:]) + 1
        tops = self._ask({"prompt": ids}, lambda found: [self._likeliest(found["top_logprobs"][at]) for at in places])
        if not all(len(one) >= self._top for one in tops):
            raise UserError(
                f"{self._address}: it names {min(map(len, tops))} likely tokens, and objective.loss_top_k is {self._top}; "
                "lower it, or let the server name more (vLLM: --max-logprobs)"
            )
        tops = [one[: self._top] for one in tops]
        likely, logprobs = (np.array([[pair[at] for pair in one] for one in tops]) for at in (0, 1))
        rest = [math.log(max(LEAST, 1 - math.fsum(map(math.exp, own)))) for own in logprobs.tolist()]
        of = np.full(len(places), place, np.int32)
        kinds = likely.astype(np.int32), logprobs.astype(np.float32), np.array(rest, np.float32)
        return Rows(of, places.astype(np.int32), document.tokens[places], *kinds)

    def _ask(self, more: dict[str, Any], read: Any) -> Any:
        return post(
            self._address, {**self._asked, **more}, "the teacher", lambda reply: read(reply["choices"][0]["logprobs"]),
            timeout=TIMEOUT,
        )  # fmt: skip

    def _likeliest(self, top: dict[str, float]) -> list[tuple[int, float]]:
        """Return ids with log-probabilities, the likeliest first. Raises UserError if tokens are not named by their ids."""
        if texts := [name for name in top if not name.startswith(ID)]:
            raise UserError(
                f"{self._address}: it names likely tokens by their texts, such as {texts[0]!r}, from which ids cannot be told; "
                "use a server that knows return_tokens_as_token_ids, such as vLLM"
            )
        found = [(int(name.removeprefix(ID)), value) for name, value in top.items()]
        return sorted((pair for pair in found if pair[0] < self._vocabulary), key=lambda pair: -pair[1])
