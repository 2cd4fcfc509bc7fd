"""Grammars that answers keep to, by llguidance: a mask of the tokens that may follow, which is applied on the device."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftjax.generate.speech import THINK, CallForm
from ftjax.serve.errors import ApiError, invalid

# Spaces as models write them; without a limit an answer could go on in spaces up to max_tokens.
SPACED = {"x-guidance": {"whitespace_pattern": r" ?|\n[ \t]{0,16}"}}


class Follower:
    """Follows one answer through its grammar.

    Args:
        after: a token that comes before the grammar begins, such as the end of reasoning; None: it begins at once.
    """

    def __init__(self, matcher: Any, words: int, after: int | None):
        self._matcher, self._words, self._after = matcher, words, after

    def mask(self) -> np.ndarray:
        found = np.zeros(self._words, np.uint32)
        if self._after is not None:
            found[:] = 2**32 - 1
            return found
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        found[: len(bits)] = bits[: self._words]
        return found

    def accept(self, token: int) -> bool:
        if self._after is not None:
            self._after = None if token == self._after else self._after
            return False
        return not self._matcher.consume_token(token) or self._matcher.is_stopped()


class Grammars:
    """Compiles grammars for one tokenizer. llguidance's own form of the vocabulary is made on first use."""

    def __init__(self, tokenizer: Any, vocab: int, ends: frozenset[int]):
        self._tokenizer, self._vocab, self._ends = tokenizer, vocab, ends
        self._words = -(-vocab // 32)
        self._own: Any = None
        self._lock = threading.Lock()

    def of_schema(self, schema: dict[str, Any], thinking: bool) -> Follower:
        """Return a follower of a JSON schema. Raises ApiError for a schema that llguidance does not take."""
        return self._follower(_json_grammar(schema), "response_format", thinking)

    def of_calls(self, form: CallForm, tools: Sequence[tuple[str, Any]], thinking: bool) -> Follower:
        """Return a follower of a call of one of these `(name, parameters)`."""
        if form.around is not None:
            return self._follower(self._around(form, tools), "tools", thinking)
        key = "parameters" if form.whole else "arguments"
        bodies = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, key: parameters or {"type": "object"}},
                "required": ["name", key],
                "additionalProperties": False,
            }
            for name, parameters in tools
        ]
        schema = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
        if form.whole:
            return self._follower(_json_grammar(schema), "tools", thinking)
        rule = f"%json {json.dumps({**schema, **SPACED})}"
        calls = "body" if form.closes else '"[" body "]"'  # without a mark after it, a list of calls ends the answer
        lark = f"start: {self._mark(form.opens)} {calls} {self._mark(form.closes)}\nbody: {rule}\n"
        return self._follower(lark, "tools", thinking)

    def _around(self, form: CallForm, tools: Sequence[tuple[str, Any]]) -> str:
        """Return the grammar of a call whose name is beside its arguments."""
        rules = []
        for number, (name, parameters) in enumerate(tools):
            before, after = (" ".join(map(self._mark, marks)) for marks in form.around(name))
            arguments = f"%json {json.dumps({**(parameters or {'type': 'object'}), **SPACED})}"
            rules.append(f"call{number}: {before} arguments{number} {after}\narguments{number}: {arguments}\n")
        return f"start: {' | '.join(f'call{number}' for number in range(len(tools)))}\n{''.join(rules)}"

    def _mark(self, mark: str | None) -> str:
        """Return a mark as the rule of a grammar: a token of its own, or a text."""
        if mark is None:
            return ""
        number = self._tokenizer.get_added_vocab().get(mark)
        if number is None:
            return json.dumps(mark)
        return f"<[{number}]>"

    def decode(self, token: int) -> bytes:
        """Return the bytes of a token."""
        return self._vocabulary().decode_bytes([token])

    def _follower(self, grammar: str, field: str, thinking: bool) -> Follower:
        from llguidance import LLMatcher

        vocabulary = self._vocabulary()
        wrong = LLMatcher.validate_grammar(grammar, vocabulary)
        if wrong and not wrong.startswith("WARNING"):
            raise invalid(f"{field}: the schema cannot be kept: {wrong}", field)
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        after = self._tokenizer.convert_tokens_to_ids(THINK[1]) if thinking else None
        return Follower(matcher, self._words, after)

    def _vocabulary(self) -> Any:
        with self._lock:
            if self._own is None:
                try:
                    from llguidance.hf import from_tokenizer
                except ImportError:
                    raise ApiError(500, "llguidance is not installed: pip install 'ftjax[serve]'") from None
                self._own = from_tokenizer(self._tokenizer, n_vocab=self._vocab, eos_token=sorted(self._ends) or None)
            return self._own


def _json_grammar(schema: dict[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": {**SPACED, **schema}}]})
