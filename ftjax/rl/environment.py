"""Environments: an answer becomes a dialogue with a class of the user's, one instance for each answer.

    class Shop:
        def reset(self, item, **columns):        # begins; a text goes to the end of the prompt
            self.price = prices[item]
        def discount(self, percent: int) -> str: # a tool that the model calls through the chat template
            ...
        def step(self, answer):                  # replies to an answer that calls no tool; None ends the dialogue
            ...
        def get_reward(self):                    # the reward named `environment`
            ...

`reset`, `get_reward` and tools are those of TRL's `environment_factory`, whose classes work unchanged if their methods are not
async. `step` is ftjax's own. Instances live on the first process, and the others are told what they said.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers.utils import get_json_schema

from ftjax.config import Config
from ftjax.config.code import refuse_unasked
from ftjax.data.example import Message
from ftjax.errors import UserError
from ftjax.evaluate.own_code import named, public_classes
from ftjax.rl.own_calls import Ended, call_within, checked, on_first
from ftjax.rl.rollout import Rollout

OWN = ("reset", "step", "get_reward")  # every other public method is a tool
EXPECTED = (
    "expected a class such as `class Game: def reset(self, **columns): ...; def step(self, answer): ...`, with a step that "
    "returns the reply to an answer (None at the end), or methods that the model calls as tools"
)


def load_environments(config: Config) -> "Environments | None":
    """Load the environment of a configuration; None if it names none.

    Raises UserError for a file without one, and for code that the user has not asked for.
    """
    if config.objective.environment is None:
        return None
    refuse_unasked(config, "objective.environment")
    path, _, name = config.objective.environment.partition(":")
    found = public_classes(path, "objective.environment", EXPECTED)
    return Environments(named(found, path, name, ("class", "classes"), EXPECTED), config.objective.reward_timeout)


class Environments:
    """Instances of one class for the answers in flight, in their order.

    Attributes:
        tools: JSON schemas of the methods that the model may call.
        calls, failures: tool calls since the dialogues began, and those that raised or named no tool.
    """

    def __init__(self, kind: type, timeout: float):
        """
        Args:
            timeout: seconds that a call of an instance may take.

        Raises UserError if the class is no environment.
        """
        self.name, self._kind, self._timeout = kind.__name__, kind, timeout
        public = {key: one for key, one in inspect.getmembers(kind, inspect.isfunction) if not key.startswith("_")}
        self._steps = "step" in public
        self._methods = [name for name in public if name not in OWN]
        if "reset" not in public or not (self._steps or self._methods):
            lacks = "no reset" if "reset" not in public else "neither a step nor a method that would be a tool"
            raise UserError(f"objective.environment: {self.name} has {lacks}; {EXPECTED}")
        self.gives_rewards = "get_reward" in public
        self.tools = [self._schema(name, public[name]) for name in self._methods]
        self._made: list[Any] = []
        self._where: list[str] = []
        self.calls = self.failures = 0

    def _schema(self, name: str, method: Callable[..., Any]) -> dict[str, Any]:
        def bound(*args: Any, **kwargs: Any) -> None: ...

        signature = inspect.signature(method)
        bound.__name__, bound.__doc__ = name, method.__doc__
        bound.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        bound.__annotations__ = {key: one for key, one in method.__annotations__.items() if key != "self"}
        try:
            return get_json_schema(bound)
        except Exception as error:  # what transformers raises for a missing type or docstring
            raise UserError(
                f"objective.environment: {self.name}.{name} cannot be described to the model: {error}; give each argument a "
                "type, and the method a docstring with a line for each under `Args:`, or begin its name with _"
            ) from None

    @property
    def current(self) -> Sequence[Any]:
        """The instances of the answers in flight; on the first process only."""
        return self._made[: len(self._where)]

    # ---- a dialogue ----

    def begin(self, rows: Sequence[Mapping[str, Any]], where: Sequence[str]) -> list[str | None]:
        """Begin a dialogue for each row; return what goes to the end of its prompt.

        Args:
            rows: columns by name.
            where: file and line of each.
        """
        self._where, self.calls, self.failures = list(where), 0, 0
        return on_first("environment", lambda: [self._reset(number, row) for number, row in enumerate(rows)])

    def reply(self, which: Sequence[int], answers: Sequence[Message]) -> list[list[Message]]:
        """Return the messages that follow each answer; none if its dialogue has ended.

        Args:
            which: numbers of the dialogues.
            answers: messages of the assistant.
        """
        told = on_first(
            "environment",
            lambda: {
                "replies": [self._replied(number, answer) for number, answer in zip(which, answers, strict=True)],
                "counts": [self.calls, self.failures],
            },
        )
        self.calls, self.failures = told["counts"]
        return told["replies"]

    def rewards(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return the reward that each instance gives; on the first process."""
        return [one.get_reward() for one in self.current]

    def _reset(self, number: int, row: Mapping[str, Any]) -> str | None:
        if number == len(self._made):
            self._made.append(self._call(self._kind, "__init__", number))
        said = self._call(partial(self._made[number].reset, **row), "reset", number)
        return self._text(said, "reset", number)

    def _replied(self, number: int, answer: Message) -> list[Message]:
        if calls := answer.get("tool_calls"):
            return [self._tool(number, call["function"]) for call in calls]
        if not self._steps:
            return []
        said = self._call(partial(self._made[number].step, answer["content"]), "step", number)
        reply = self._text(said, "step", number)
        return [] if reply is None else [{"role": "user", "content": reply}]

    def _tool(self, number: int, function: Mapping[str, Any]) -> Message:
        """Call a tool. What it raises is told to the model, as in TRL."""
        self.calls += 1
        name, arguments = function["name"], function["arguments"]
        if name not in self._methods:
            self.failures += 1
            return _said_by(name, {"error": f"Tool {name} not found."})
        if not isinstance(arguments, dict):
            self.failures += 1
            return _said_by(name, {"error": "The arguments are no JSON object."})
        call = partial(getattr(self._made[number], name), **arguments)
        ended = call_within(self._timeout, f"{self.name}.{name}", call)
        if ended is not None and ended.error is not None:
            self.failures += 1
            return _said_by(name, {"error": str(ended.error)})
        return _said_by(name, self._checked(ended, name, number))

    def _call(self, call: Callable[[], Any], name: str, number: int) -> Any:
        return self._checked(call_within(self._timeout, f"{self.name}.{name}", call), name, number)

    def _checked(self, ended: Ended | None, name: str, number: int) -> Any:
        return checked(ended, f"{self.name}.{name}", f"in the dialogue of {self._where[number]}", self._timeout)

    def _text(self, said: Any, name: str, number: int) -> str | None:
        if said is None or isinstance(said, str):
            return said
        raise UserError(
            f"{self.name}.{name}: it returned {said!r:.60} in the dialogue of {self._where[number]}; expected a text, or None"
        )


def _said_by(name: str, value: Any) -> Message:
    return {"role": "tool", "name": name, "content": str(value)}


def call_message(content: str, calls: Sequence[tuple[str, str]]) -> Message:
    """Return an assistant's message; arguments that are no JSON stay text."""
    if not calls:
        return {"role": "assistant", "content": content}
    found = [{"type": "function", "function": {"name": name, "arguments": _parsed(text)}} for name, text in calls]
    return {"role": "assistant", "content": content, "tool_calls": found}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
