"""Requests of OpenAI's API: their fields, and what each becomes for the engine.

A field that the server does not know is refused. `user`, `metadata`, `store`, `service_tier`, `safety_identifier` and
`prompt_cache_key` are about OpenAI's own service; they are taken and have no effect. `top_k`, `min_p`, `repetition_penalty`,
`chat_template_kwargs`, `return_tokens_as_token_ids` and `pooling` are additions, with the names that other servers use.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError

from ftjax.data.dialect import Arguments
from ftjax.data.example import Message
from ftjax.errors import UserError
from ftjax.generate.sample import Sampling
from ftjax.serve.errors import ApiError, invalid

MOST_CHOICES = 128
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MESSAGE_FIELDS = (
    "role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "reasoning_content", "reasoning",
    "audio", "annotations",
)  # fmt: skip


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class Sampled(Strict):
    """What requests for chats and completions have in common."""

    model: str
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    top_k: StrictInt | None = None
    min_p: StrictFloat | None = None
    repetition_penalty: StrictFloat | None = None
    presence_penalty: StrictFloat | None = None
    frequency_penalty: StrictFloat | None = None
    logit_bias: dict[str, Annotated[StrictFloat, Field(ge=-100, le=100)]] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = 1
    seed: StrictInt | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def sampling(self, own: dict[str, Any]) -> Sampling:
        """Return the settings, where the request has none those of the model (`own`, its generation_config.json).

        Without either the temperature is 1, as in OpenAI's API.
        """
        names = ("temperature", "top_k", "top_p", "min_p")
        given = {name: own.get(name) for name in names} if own.get("do_sample") else {}
        given["repetition_penalty"] = own.get("repetition_penalty")
        if given.get("temperature") is None:
            given["temperature"] = 1.0
        names = (*names, "repetition_penalty", "presence_penalty", "frequency_penalty")
        given |= {name: value for name in names if (value := getattr(self, name)) is not None}
        if given.get("top_k", 0) == -1:  # no limit, for other servers
            given["top_k"] = 0
        try:
            return Sampling(**{name: value for name, value in given.items() if value is not None})
        except UserError as error:
            raise invalid(str(error), str(error).partition(" ")[0]) from None

    def bias(self, vocab: int, most: int) -> dict[int, float]:
        """Return the bias of each token. Raises ApiError for what is no token of the model's, and for too many."""
        given = self.logit_bias or {}
        if len(given) > most:
            raise invalid(f"logit_bias has {len(given)} tokens; the most is {most}", "logit_bias")
        for token in given:
            if not token.isdecimal() or len(token) > 9 or int(token) >= vocab:
                raise invalid(f"logit_bias: {_short(token)} is not a token id from 0 to {vocab - 1}", "logit_bias")
        return {int(token): value for token, value in given.items()}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class JsonSchema(Strict):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: StrictBool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def forced(self) -> str | None:
        """The function that the answer must call, `*` for any; None: the model decides."""
        choice = self.tool_choice
        if choice in (None, "auto", "none"):
            return None
        names = [tool.function.name for tool in self.tools or ()]
        if not names:
            raise invalid("tool_choice is given without tools", "tool_choice")
        if choice == "required":
            return "*"
        named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = named.get("name") if isinstance(named, dict) else None
        if name not in names:
            raise invalid(f"tool_choice: expected auto, none, required or one of the tools ({', '.join(names)})", "tool_choice")
        return name

    def for_template(self) -> list[Message]:
        """Return the messages as chat templates take them: texts in one piece, arguments as objects."""
        return [_message(message, f"messages.{number}") for number, message in enumerate(self.messages)]

    def tools_for_template(self) -> list[Any] | None:
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = 16  # 0: the prompt alone, with `echo`
    echo: StrictBool | None = False
    best_of: StrictInt | None = None
    return_tokens_as_token_ids: StrictBool | None = False
    suffix: None = None

    @property
    def most(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        return one_or_many(self.prompt, "prompt")


class EmbeddingRequest(Strict):
    """`POST /v1/embeddings`."""

    model: str
    input: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["last", "mean"] = "last"
    dimensions: None = None
    user: Any = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return one_or_many(self.input, "input")


class LoadAdapter(Strict):
    """`POST /v1/load_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: str


class UnloadAdapter(Strict):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """Return a request. Raises ApiError, 400 with the field, for what is not valid."""
    try:
        given = json.loads(body)
        if b"\\u" in body:
            json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid("the body has half of a surrogate pair, such as \\ud800, which is no character", None) from None
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}", None) from None
    if not isinstance(given, dict):
        raise invalid(f"expected a JSON object; found {type(given).__name__}", None)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _as_api(error, kind) from None


def _as_api(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    """Return the first problem in OpenAI's form, under the name of the field as it was given."""
    found = error.errors(include_url=False)
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    first = next((one for one in same if not one["type"].endswith("_type")), found[0])  # of a union, the member that was meant
    where = [str(part) for part in first["loc"]]
    # Pydantic also names the member of a union that it tried, which no client has written.
    where = [part for at, part in enumerate(where) if not at or not any(mark in part for mark in ("[", "str", "function-"))]
    name = ".".join(where)
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        return invalid(f"unknown field {name}; the fields of this request are {known}", name, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"{name} is missing", name, "missing_required_parameter")
    return invalid(f"{name}: {first['msg']}; found {_short(first['input'])}", name, "invalid_value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_or_many(given: str | Sequence[Any], name: str) -> list[str | list[int]]:
    """Return the texts of a request, each a string or token ids. Raises ApiError if there are none."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid(f"{name} is empty", name)
    return [list(given)] if isinstance(given[0], int) else list(given)


def _message(message: dict[str, Any], where: str) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise invalid(f"{where}.role: expected one of {', '.join(ROLES)}; found {_short(role)}", f"{where}.role")
    for name in message:
        if name not in MESSAGE_FIELDS:
            raise invalid(f"{where}.{name} is not a field of a message", f"{where}.{name}", "unknown_parameter")
    made = {name: value for name, value in message.items() if value is not None or name == "content"}
    made["role"] = "system" if role == "developer" else role
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise invalid(
                    f"{where}.content.{number}: expected a part of type text; this server reads text only",
                    f"{where}.content.{number}",
                )
        made["content"] = "".join(part["text"] for part in content)
    elif content is not None and not isinstance(content, str):
        raise invalid(f"{where}.content: expected a text; found {_short(content)}", f"{where}.content")
    elif content is None and role != "assistant":
        raise invalid(f"{where}.content is missing", f"{where}.content", "missing_required_parameter")
    if "tool_calls" in made:
        if not isinstance(made["tool_calls"], list):
            raise invalid(f"{where}.tool_calls: expected a list of calls", f"{where}.tool_calls")
        made["tool_calls"] = [_call(call, f"{where}.tool_calls.{n}") for n, call in enumerate(made["tool_calls"])]
    return made


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(f"{where}: expected a call with function.name and function.arguments", where)
    return {**call, "function": {**function, "arguments": Arguments.read(function.get("arguments"))}}
