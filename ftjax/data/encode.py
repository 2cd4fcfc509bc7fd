"""From examples to token ids, each with the weight that it has in the loss.

Every token carries its weight from the moment it is encoded. The prompt `Hi` with the completion ` there`, for a tokenizer
that puts a BOS before a text, is `<s> Hi _there </s>` with weights `0 0 1 1`.

A text is tokenised whole and its boundaries are looked up by character, which costs one pass. Where the tokenizer merges
characters across the boundary between a prompt and its answer, the two are tokenised one after the other instead: a model
that generates has the prompt's own tokens before it, and never half of a merged one. The ids before the answer are so the
same that `render_prompt` makes.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftjax.data.example import Example
from ftjax.data.faults import Faults
from ftjax.data.template import Template, with_chat_bos
from ftjax.data.tokens import Tokens, end_token, first_token
from ftjax.errors import UserError


@dataclass(frozen=True, slots=True)
class Encoded:
    """`tokens` int32 `[n]` of one document, and `weights` float32 `[n]`: that of each as something to be predicted."""

    tokens: np.ndarray
    weights: np.ndarray
    where: str
    source: int = 0


class NoWay(UserError):
    """The tokenizer cannot serve the data: no row's fault, so none is skipped for it."""


@dataclass(slots=True)
class _Plan:
    """A text and its spans: from, to, weight. `answered`: it ends with an answer, behind which the end is trained."""

    example: Example
    text: str
    spans: list[tuple[int, int, float]]
    chat: bool = False
    answered: bool = True


@dataclass
class Encoder:
    """Encodes examples in batches; `notes` counts what is worth a warning."""

    tokenizer: Any
    train_on_inputs: bool = False
    last_turn_only: bool = False
    notes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self):
        self.tokens = Tokens(self.tokenizer)
        self._templates: dict[bool, Template] = {}

    def __call__(self, examples: Sequence[Example], faults: Faults | None = None) -> list[Encoded | None]:
        """A document for each example, or None for one that `faults` skips.

        Raises UserError where the tokenizer lacks an EOS token or a chat template that the data needs, and, with file and
        line, where the template refuses a conversation.
        """
        (documents,) = self.stream([examples], faults)
        return documents

    def stream(self, chunks: Iterable[Sequence[Example]], faults: Faults | None = None) -> Iterator[list[Encoded | None]]:
        """As a call for each of many chunks. While one is tokenised, by threads without Python, templates are rendered for the
        next and weights found for the one before."""
        faults = faults or Faults()
        waiting: tuple[list[_Plan | Encoded | None], Future] | None = None
        with ThreadPoolExecutor(1, "tokenize") as pool:
            for examples in chunks:
                plans = [self._planned(example, faults) for example in examples]
                texts = [plan.text for plan in plans if isinstance(plan, _Plan)]
                coming = plans, pool.submit(self.tokens.batch, texts)
                if waiting is not None:
                    yield self._encoded(*waiting)
                waiting = coming
            if waiting is not None:
                yield self._encoded(*waiting)

    def _encoded(self, plans: list["_Plan | Encoded | None"], batch: Future) -> list[Encoded | None]:
        encodings = iter(batch.result())
        return [self._encode(plan, next(encodings)) if isinstance(plan, _Plan) else plan for plan in plans]

    def _planned(self, example: Example, faults: Faults) -> "_Plan | Encoded | None":
        try:
            return self._ready(example) if example.input_ids is not None else self._plan(example)
        except NoWay:
            raise
        except UserError as error:
            faults(error)
            return None

    # ---- what is trained ----

    def _plan(self, example: Example) -> _Plan:
        if example.text is not None:
            self._need_eos()
            return _Plan(example, example.text, [(0, len(example.text), 1.0)])
        if not example.is_chat(self.tokenizer):
            self._need_eos()
            start = len(example.prompt)
            text = example.prompt + example.completion
            joined = text[max(0, start - 1) : start + 1]
            self.notes["joined without a space"] += len(joined) == 2 and not any(c.isspace() for c in joined)
            return _Plan(example, text, [(0 if self.train_on_inputs else start, len(text), 1.0)])
        return self._chat(example)

    def _chat(self, example: Example) -> _Plan:
        template = self._template(example)
        marked = any("train" in m or "weight" in m for m in example.messages)
        if self.train_on_inputs and not marked:
            text = template.render(example.messages, False, example.where, example.tools, example.template_arguments)
            turns = []
        elif self.last_turn_only:
            text, turns = template.last_turn(example)
        elif example.prompt_turns is not None:
            text, turns = template.split_at(example, example.prompt_turns)
        else:
            self.notes["found turn by turn"] += not template.marked
            text, turns = template.turns(example)
        spans = [(0, len(text), 1.0)] if self.train_on_inputs else []
        for number, (start, stop) in turns:
            message = example.messages[number] if number >= 0 else {}
            weight = float(message.get("weight", 1.0)) if message.get("train", True) else 0.0
            spans.append((start, stop, weight))
        return _Plan(example, text, spans, chat=True, answered=example.messages[-1]["role"] == "assistant")

    def _template(self, example: Example) -> Template:
        tools = example.tools is not None
        if tools not in self._templates:
            try:
                self._templates[tools] = Template(self.tokenizer, example.tools)
            except UserError as error:
                raise NoWay(f"{example.where}: {error}") from None
        return self._templates[tools]

    def _need_eos(self) -> None:
        if self.tokens.eos is None:
            raise NoWay(
                "the tokenizer has no EOS token, so the model could not learn where an answer ends; set model.tokenizer to one "
                "that has"
            )

    def _ready(self, example: Example) -> Encoded:
        ids = np.array(example.input_ids, np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.tokens.size):
            at = int(np.argmax((ids < 0) | (ids >= self.tokens.size)))
            raise UserError(
                f"{example.where}: input_ids[{at}] is {ids[at]}, and the tokenizer has the ids 0 to {self.tokens.size - 1}; "
                "was the data tokenised for another model?"
            )
        trained = np.array(example.labels, np.int64) != -100
        return Encoded(ids.astype(np.int32), trained.astype(np.float32), example.where, example.source)

    # ---- ids and weights ----

    def _encode(self, plan: _Plan, encoding: Any) -> Encoded:
        length = len(plan.text)
        cuts = sorted({a for a, _, w in plan.spans if 0 < a < length and w and first_token(encoding, a, length)[1]})
        if cuts:
            self.notes["merged boundary"] += 1
            ids, weights = self._in_pieces(plan, cuts)
        else:
            ids, weights = encoding.ids, _weights(encoding, plan.spans, length)
        ids, weights = (self._finish_chat if plan.chat else self._finish_text)(plan, ids, weights)
        return Encoded(np.array(ids, np.int32), weights, plan.example.where, plan.example.source)

    def _in_pieces(self, plan: _Plan, cuts: list[int]) -> tuple[list[int], np.ndarray]:
        """The text tokenised up to each cut by itself."""
        ids: list[int] = []
        weights: list[np.ndarray] = []
        edges = [0, *cuts, len(plan.text)]
        for start, stop in itertools.pairwise(edges):
            piece = plan.text[start:stop]
            encoding, tokens, characters = self.tokens.continuation(piece) if start else (self.tokens.batch([piece])[0], 0, 0)
            shift = characters - start
            spans = [(max(a, start) + shift, min(b, stop) + shift, w) for a, b, w in plan.spans if a < stop and b > start]
            weights.append(_weights(encoding, spans, len(piece) + characters)[tokens:])
            ids += encoding.ids[tokens:]
        return ids, np.concatenate(weights)

    def _finish_text(self, plan: _Plan, ids: list[int], weights: np.ndarray) -> tuple[list[int], np.ndarray]:
        """One BOS, not trained, and one EOS, trained."""
        count = len(ids)
        ids = self.tokens.with_prefix(ids)
        added = len(self.tokens.prefix)
        weights = np.concatenate([np.zeros(added, np.float32), weights[count - (len(ids) - added) :]])
        if ids[-1:] == [self.tokens.eos] and len(ids) > added:
            weights[-1] = 1.0
            return ids, weights
        return [*ids, self.tokens.eos], np.append(weights, np.float32(1.0))

    def _finish_chat(self, plan: _Plan, ids: list[int], weights: np.ndarray) -> tuple[list[int], np.ndarray]:
        """One BOS where the tokenizer uses one, and a trained end behind the last answer."""
        bos = self.tokens.bos
        if bos is not None:
            self.notes["BOS added"] += ids[:1] != [bos]
            count = len(ids)
            ids = with_chat_bos(ids, self.tokens)
            kept = len(ids) - 1
            weights = np.concatenate([np.zeros(1, np.float32), weights[count - kept :]])
        if self.train_on_inputs or not weights.any():
            trained = len(ids) - 1 if weights.any() else None
        else:
            weights = self._with_ends(ids, weights, plan.answered)
            trained = int(np.flatnonzero(weights)[-1])
        if trained is None or not plan.answered or self.tokens.ends.intersection(ids[max(0, trained - 3) :]):
            return ids, weights
        self._need_eos()
        self.notes["end added"] += 1
        return [*ids[: trained + 1], self.tokens.eos], np.append(weights[: trained + 1], weights[trained])

    def _with_ends(self, ids: list[int], weights: np.ndarray, answered: bool) -> np.ndarray:
        """An end of turn that stands right behind a trained span which holds none is trained with it.

        Behind the last answer a special token can only be its end; behind an earlier one it may begin the next turn.
        """
        ends = {self.tokens.eos}
        last = int(np.flatnonzero(weights)[-1])
        if answered and last + 1 < len(ids) and ids[last + 1] in self.tokens.ends:
            ends.add(ids[last + 1])
        for stop in np.flatnonzero((weights[:-1] > 0) & (weights[1:] == 0)).tolist():
            tail = [
                token
                for token, weight in zip(ids[max(0, stop - 3) : stop + 1], weights[max(0, stop - 3) :], strict=False)
                if weight
            ]
            if ids[stop + 1] in ends and not self.tokens.ends.intersection(tail):
                weights[stop + 1] = weights[stop]
                self.notes["end outside the marks"] += 1
        return weights


def _weights(encoding: Any, spans: list[tuple[int, int, float]], length: int) -> np.ndarray:
    """Of each token of a text of `length` characters; a later span overrides an earlier one."""
    weights = np.zeros(len(encoding.ids), np.float32)
    for start, stop, weight in spans:
        first = 0 if start <= 0 else first_token(encoding, start, length)[0]
        weights[first : len(weights) if stop >= length else end_token(encoding, stop, length)] = weight
    return weights
