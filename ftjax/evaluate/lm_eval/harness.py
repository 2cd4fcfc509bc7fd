"""The model `ftjax` of lm-evaluation-harness (Gao et al. 2021, doi:10.5281/zenodo.5371628).

Importing this module registers it. Requests are tokenized, truncated and decoded as by lm_eval's `hf` model, so that the same
weights give the same numbers.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ftjax.errors import UserError
from ftjax.evaluate.likelihood import batches
from ftjax.evaluate.target import find_target
from ftjax.generate.finite import require_finite
from ftjax.generate.score import Query, arrays
from ftjax.generate.session import BATCH_SIZE, Generator
from ftjax.hub.tokenizer.ends import end_ids
from ftjax.models.classifier import classes_of

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# A request in lm_eval: ((context, continuation) or None, ids of the context, ids of the continuation)
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("ftjax")
class FtjaxLM(TemplateLM):
    """Scores and generates with a `Generator`, in batches of similar lengths and few shapes."""

    def __init__(
        self, path: str | Generator | None = None, adapter: str | None = None, *, revision: str | None = None,
        tokenizer: str | None = None, dtype: str = "auto", batch_size: int | str | None = None, max_length: int | None = None,
        add_bos_token: bool | None = None, prefix_token_id: int | None = None, seed: int = 0,
        enable_thinking: bool | None = None, think_end_token: str | None = None, device: str | None = None,
        max_batch_size: int | None = None, **unknown: Any,
    ):  # fmt: skip
        """Takes the arguments of `--model_args`.

        Args:
            path: a run, a model or a PEFT folder, as for `ftjax evaluate`; or a loaded model.
            adapter: a PEFT folder.
            revision, tokenizer: as in `model:` of a configuration.
            dtype: `auto`, `float32`, `bfloat16` or `float16`.
            batch_size: rows per batch; None and `auto` are 32. Batches are smaller if the attention scores are large.
            max_length: tokens of the longest text; None for the model's context.
            add_bos_token: whether a text begins with BOS; None for the tokenizer's default.
            prefix_token_id: the token before a text without a context; None for BOS, or else EOS.
            seed: seed of sampling.
            enable_thinking, think_end_token: for chat templates with thinking; the text up to this token is dropped.
            device: ignored, though lm_eval always sends one: JAX_PLATFORMS names the device.
            max_batch_size: an upper bound of `batch_size`.

        Raises UserError if an argument is unknown or the model cannot be loaded.
        """
        super().__init__()
        if unknown or path is None:
            what = f"unknown: {', '.join(unknown)}; " if unknown else ""
            raise UserError(
                f"--model_args of ftjax: {what}expected path=MODEL_OR_RUN and, if need be, adapter, revision, tokenizer, "
                "dtype, batch_size, max_length, add_bos_token, prefix_token_id, seed, enable_thinking, think_end_token"
            )
        self.generator = path if isinstance(path, Generator) else _load(path, adapter, revision, tokenizer, dtype)
        if classes_of(self.generator.model.config):
            raise UserError("the model has a classification head, and these tasks need a model that generates; use --task")
        self.tokenizer, self.name = self.generator.tokenizer, path if isinstance(path, str) else "ftjax"
        rows = BATCH_SIZE if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        self.batch_size = min(rows, max_batch_size or rows)
        self.max_length = max_length or self.generator.context
        if self.max_length > self.generator.context:
            raise UserError(f"max_length: {max_length} tokens; the model's context is {self.generator.context}")
        self.add_bos_token, self.seed, self._prefix = add_bos_token, seed, prefix_token_id
        self.template_arguments = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.think_end_token = think_end_token
        self.max_gen_toks = 256
        # As in `hf`: the ends that config files name. A task passes a chat template's end of turn as a stop string.
        self.ends = end_ids(self.generator.model.config, self.generator.settings, None) | {self.eot_token_id}

    # ---- ids ----

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        if self._prefix is not None:
            return self._prefix
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text; one that already begins with BOS, as by a chat template, gets no second BOS."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self._ids(string, self.add_bos_token if add_special_tokens is None else add_special_tokens)

    def _ids(self, text: str, special: bool | None) -> list[int]:
        return self.tokenizer.encode(text, **({} if special is None else {"add_special_tokens": special}))

    # ---- likelihood ----

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score the continuations; texts that are too long lose their beginning.

        Continuations of the same tokens, as in most multiple choice with answers of one token, share one forward pass.
        """
        same: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens; expected 1 to {self.max_length}, the model's context"
                )
            same[tuple([*context, *continuation][-self.max_length - 1 : -1])].append(number)
        queries = []
        for tokens, numbers in same.items():
            sizes = [len(requests[number][2]) for number in numbers]
            index = [place for size in sizes for place in range(len(tokens) - size, len(tokens))]
            queries.append(Query(tokens, index, [token for number in numbers for token in requests[number][2]]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        members, engine = list(same.values()), self.generator.engine
        with _bar(len(requests), "loglikelihood", disable_tqdm) as bar:
            for batch, rows in batches(self.generator, [len(query.tokens) for query in queries], self.batch_size):
                logprobs, best = engine.score(self.generator.params, *arrays([queries[i] for i in batch], rows))
                for row, i in enumerate(batch):
                    own = logprobs[row, : len(queries[i].targets)]
                    require_finite(own, "a request", self.generator.model, self.generator.params)
                    start = 0
                    for number in members[i]:
                        part = slice(start, start := start + len(requests[number][2]))
                        found[number] = float(logprobs[row, part].sum()), bool(best[row, part].all())
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
                    bar.update(len(members[i]))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in windows of the model's context; predicts each token once, after as many tokens as fit."""
        windows = [self._windows(request.args[0]) for request in requests]
        scored = iter(self._loglikelihood_tokens([(None, *one) for several in windows for one in several], disable_tqdm))
        found = []
        for request, several in zip(requests, windows, strict=True):
            found.append(sum(next(scored)[0] for _ in several))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in cut]

    # ---- answers ----

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers, in batches of requests with equal settings, longest first."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        found = [""] * len(requests)
        with _bar(len(requests), "generate_until", disable_tqdm) as bar:
            for numbers in alike.values():
                texts = self._answers([requests[n].args[0] for n in numbers], requests[numbers[0]].args[1], bar.update)
                for number, text in zip(numbers, texts, strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _answers(self, contexts: Sequence[str], asked: Mapping[str, Any], progress: Callable[[int], Any]) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), self.max_gen_toks))
        until = handle_stop_sequences(settings.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        longest, sampled = settings.pop("max_gen_toks"), settings.pop("do_sample", False)
        chosen = {name: settings.pop(name) for name in SAMPLING if name in settings}
        if settings:
            raise UserError(f"generation_kwargs: {', '.join(settings)} is not known; known: until, max_gen_toks, do_sample, "
                            f"{', '.join(SAMPLING)}")  # fmt: skip
        if not sampled:
            chosen = {key: value for key, value in chosen.items() if key == "repetition_penalty"}
        elif not chosen.get("temperature"):
            chosen["temperature"] = 1.0
        chosen.setdefault("repetition_penalty", self.generator.settings.get("repetition_penalty") or 1.0)
        room = self.max_length - longest
        if room < 1:
            raise UserError(
                f"max_gen_toks: {longest} tokens leave no room for a prompt in the model's context, {self.max_length}"
            )
        bos = has_bos_prefix(contexts[0], self.tokenizer.bos_token)
        prompts = [self._ids(text, False if bos else self.add_bos_token)[-room:] for text in contexts]
        done = 0

        def report(finished: int, tokens: int) -> None:
            nonlocal done
            progress(finished - done)
            done = finished

        ends, self.generator.ends = self.generator.ends, self.ends
        try:
            answers = self.generator.generate(
                prompts,
                max_new_tokens=longest,
                stop=until,
                seed=self.seed,
                batch_size=self.batch_size,
                progress=report,
                **chosen,
            )
        finally:
            self.generator.ends = ends
        texts = [self.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
        return [postprocess_generated_text(text, until, self.think_end_token) for text in texts]

    # ---- chats ----

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation; without its system message if the template refuses one."""
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **self.template_arguments}
        options["continue_final_message"] = not add_generation_prompt
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except jinja2.TemplateError:
            chat_history = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(chat_history, **options)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval writes beside its results."""
        sizes = sum(spec.size for spec in self.generator.model.specs.values())
        return {"model_num_parameters": sizes, "model_dtype": str(self.generator.engine.dtype)}


def _load(path: str, adapter: str | None, revision: str | None, tokenizer: str | None, dtype: str) -> Generator:
    given = {"model.revision": revision, "model.tokenizer": tokenizer, "evaluate.dtype": dtype}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    return find_target(str(path), overrides, adapter=Path(adapter) if adapter else None).load()


def _bar(total: int, what: str, disable: bool) -> Any:
    return tqdm(total=total, desc=f"Running {what} requests", disable=disable)
