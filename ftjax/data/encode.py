"""Encodes examples as token ids, each with its weight in the loss.

Every token has its weight from the moment it is encoded. The prompt `Hi` with the completion ` there`, for a tokenizer that
puts a BOS before a text, is `<s> Hi _there </s>` with weights `0 0 1 1`.

A text is tokenised as a whole, and also up to each boundary between a prompt and its answer: those are the ids that
`render_prompt` returns and that a generating model sees. If the whole text does not begin with them, because the tokenizer
merges characters across the boundary or splits those before it differently, the answer is tokenised separately and appended
to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.data.encoder import Encoded, NoWay, RowEncoder, TextPlan
from ftjax.data.example import Example
from ftjax.data.template import Template, with_chat_bos
from ftjax.data.tokens import end_token, first_token
from ftjax.errors import UserError


@dataclass
class Encoder(RowEncoder):
    """Encodes texts and conversations whose answers are trained.

    Raises UserError if the tokenizer lacks an EOS token or a chat template that the data needs, and, with file and line, if
    the template refuses a conversation.
    """

    train_on_inputs: bool = False
    last_turn_only: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._templates: dict[bool, Template] = {}

    # ---- what is trained ----

    def plan(self, example: Example) -> Sequence[TextPlan | Encoded]:
        """Plan the one document of an example; see `RowEncoder.plan`."""
        if example.prompt is not None and example.completion is None:
            raise UserError(
                f"{example.where}: there is a prompt and no answer to imitate (data.format: prompt); expected columns prompt "
                "and completion, or an objective that generates the answers: grpo, rloo, or distill with lmbda: 1"
            )
        return [self._ready(example) if example.input_ids is not None else self._text(example)]

    def _text(self, example: Example) -> TextPlan:
        if example.text is not None:
            self._need_eos()
            return TextPlan(example, example.text, [(0, len(example.text), 1.0)])
        if not example.is_chat(self.tokenizer):
            self._need_eos()
            start = len(example.prompt)
            text = example.prompt + example.completion
            joined = text[max(0, start - 1) : start + 1]
            self.notes["joined without a space"] += len(joined) == 2 and not any(c.isspace() for c in joined)
            spans = [(0 if self.train_on_inputs else start, len(text), 1.0)]
            return TextPlan(example, text, spans, [start] if start else [])
        return self._chat(example)

    def _chat(self, example: Example) -> TextPlan:
        template = self._template(example)
        chat = template.prepare(example)
        example, notes = chat.example, chat.notes
        messages, where = example.messages, example.where
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        weights = [float(m.get("weight", 1.0)) if m.get("train", True) else 0.0 for m in messages]
        whole = self.train_on_inputs and not any("train" in m or "weight" in m for m in messages)
        turns, cuts = [], []
        if whole:
            text = template.render(messages, False, where, example.tools, example.template_arguments)
            if answers:
                cuts = [prompt for prompt in [template.prompt_end(example, answers[-1], text)] if prompt]
                notes["prompt differs"] = not cuts
        elif self.last_turn_only:
            text, turns = template.last_turn(example)
        elif example.prompt_turns is not None:
            text, turns = template.split_at(example, example.prompt_turns)
        else:
            notes["found turn by turn"] = not template.marked
            text, turns = template.turns(example)
        spans = [(0, len(text), 1.0)] if self.train_on_inputs else []
        for turn in turns:
            weight = weights[turn.number] if turn.number >= 0 else 1.0
            spans.append((turn.start, turn.stop, weight))
            if weight:
                cuts.append(turn.start if turn.prompt is None else turn.prompt)
                notes["prompt differs"] |= turn.prompt is None
        first = example.prompt_turns or 0
        trained = [n for n in (answers[-1:] if self.last_turn_only else answers) if weights[n] and n >= first]
        notes |= template.left_out(example, text, trained)
        notes["answer left out"] = any(not _holds(text, messages[n].get("content")) for n in trained)
        spelled, control = template.control.spelled(messages), None
        if chat.hidden:
            control, places = template.control, [*cuts, *(place for a, b, _ in spans for place in (a, b))]
            text, places = control.reveal(text, places, where)
            cuts, places = places[: len(cuts)], iter(places[len(cuts) :])
            spans = [(next(places), next(places), weight) for _, _, weight in spans]
        self.notes.update(notes)
        return TextPlan(
            example, text, spans, sorted({cut for cut in cuts if 0 < cut < len(text)}), whole=whole, chat=True,
            answered=messages[-1]["role"] == "assistant", spelled=spelled,
            closers=frozenset(closer for closer in template.closers if closer is not None), control=control,
        )  # fmt: skip

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

    def encode(self, plan: TextPlan, encodings: list[Any]) -> Encoded:
        """Return the document from the encodings of the text up to each cut, and of the whole text."""
        ids: list[int] = []
        weights = np.zeros(0, np.float32)
        start, merged, differs = 0, False, False
        for stop, encoding in zip([*plan.cuts, len(plan.text)], encodings, strict=True):
            first, shift, last = len(ids), 0, stop == len(plan.text)
            if plan.whole:
                if not last:
                    differs |= encoding.ids != encodings[-1].ids[: len(encoding.ids)]
                    continue
            elif encoding.ids[:first] != ids:  # the longer text changes the ids of its beginning
                merged, differs = True, differs or not last
                batch = plan.control.batch if plan.control else None
                encoding, first, characters = self.tokens.continuation(plan.text[start:stop], batch)
                shift = characters - start
            ids += encoding.ids[first:]
            weights = np.append(weights, _weights(encoding, first, plan.spans, start, stop, shift))
            start = stop
        self.notes["merged boundary"] += merged
        self.notes["prompt ids differ"] += differs
        if plan.control:
            ids = plan.control.real(ids)
        ids, weights = (self._finish_chat if plan.chat else self._finish_text)(plan, ids, weights)
        unknown = self.tokens.unknown
        self.notes["unknown tokens"] += unknown is not None and unknown in (np.array(ids)[weights > 0])
        return Encoded(np.array(ids, np.int32), weights, plan.example.where, plan.example.source)

    def _finish_text(self, plan: TextPlan, ids: list[int], weights: np.ndarray) -> tuple[list[int], np.ndarray]:
        """Add one BOS without weight and one EOS with weight."""
        count = len(ids)
        ids = self.tokens.with_prefix(ids)
        added = len(self.tokens.prefix)
        weights = np.concatenate([np.zeros(added, np.float32), weights[count - (len(ids) - added) :]])
        if ids[-1:] == [self.tokens.eos] and len(ids) > added:
            weights[-1] = 1.0
            return ids, weights
        return [*ids, self.tokens.eos], np.append(weights, np.float32(1.0))

    def _finish_chat(self, plan: TextPlan, ids: list[int], weights: np.ndarray) -> tuple[list[int], np.ndarray]:
        """Add one BOS if the tokenizer uses one, and a trained end after the last answer."""
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
            weights = self._with_ends(ids, weights, plan)
            trained = int(np.flatnonzero(weights)[-1])
        if trained is None or not plan.answered or self._ends(plan).intersection(ids[max(0, trained - 3) :]):
            return ids, weights
        self._need_eos()
        self.notes["end added"] += 1
        return [*ids[: trained + 1], self.tokens.eos], np.append(weights[: trained + 1], weights[trained])

    def _ends(self, plan: TextPlan) -> frozenset[int]:
        """Return the tokens that end a turn of this text: EOS, the tokens with which the template closes answers, and
        special tokens that no answer spells, so that the template must have written them."""
        return (self.tokens.ends - plan.spelled) | plan.closers | ({self.tokens.eos} - {None})

    def _with_ends(self, ids: list[int], weights: np.ndarray, plan: TextPlan) -> np.ndarray:
        """Train the end of a turn that directly follows a trained span without an end of its own.

        After the last answer a special token can only be its end; after an earlier answer it may begin the next turn.
        """
        all_ends, ends = self._ends(plan), {self.tokens.eos} | plan.closers
        last = int(np.flatnonzero(weights)[-1])
        if plan.answered and last + 1 < len(ids) and ids[last + 1] in self.tokens.ends:
            ends.add(ids[last + 1])
        for stop in np.flatnonzero((weights[:-1] > 0) & (weights[1:] == 0)).tolist():
            tail = [
                token
                for token, weight in zip(ids[max(0, stop - 3) : stop + 1], weights[max(0, stop - 3) :], strict=False)
                if weight
            ]
            if ids[stop + 1] in ends and not all_ends.intersection(tail):
                weights[stop + 1] = weights[stop]
                self.notes["end outside the marks"] += 1
        return weights


def _weights(encoding: Any, first: int, spans: list[tuple[int, int, float]], start: int, stop: int, shift: int) -> np.ndarray:
    """Return the weights of the tokens from index `first` on, which encode characters `start` to `stop` of the text. In the
    encoding, characters are shifted by `shift`. A later span overrides an earlier one."""
    weights = np.zeros(len(encoding.ids), np.float32)
    length = stop + shift
    for a, b, weight in spans:
        if a < stop and b > start:
            begin = first if a <= start else first_token(encoding, a + shift, length)[0]
            weights[begin : len(weights) if b >= stop else end_token(encoding, b + shift, length)] = weight
    return weights[first:]


def _holds(text: str, content: str | None) -> bool:
    """Return whether the text contains the content, ignoring white space."""
    return not content or content in text or "".join(content.split()) in "".join(text.split())
