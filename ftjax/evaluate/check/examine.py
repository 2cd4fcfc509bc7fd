"""All measurements of a check on one model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftjax.config import CheckConfig, DataConfig
from ftjax.config.evaluate import LmEvalConfig
from ftjax.evaluate.check.answers import judge, languages, shares
from ftjax.evaluate.check.counterfactual import Measured, measure
from ftjax.evaluate.check.material import Asked, Material, Piece, spread
from ftjax.evaluate.check.speed import speed
from ftjax.evaluate.check.stability import in_company, whitespace
from ftjax.evaluate.check.verbatim import continued
from ftjax.evaluate.likelihood import encode, likelihoods
from ftjax.evaluate.lm_eval.scores import HarnessScore, harness_scores
from ftjax.evaluate.statistic import Scores, means
from ftjax.evaluate.tasks.loss import loss
from ftjax.generate.answer import Generation
from ftjax.generate.session import Generator

TEXT_LENGTH = 1024  # tokens; longer passages are split


@dataclass
class Examined:
    """Results of one model.

    Attributes:
        asked, answers, judged: the prompts, the answers to them, and the properties of each (`judge`).
        scores: metrics over rows, by name.
        numbers: the other metrics; `counts`: number of prompts of those that are maxima over prompts.
        missing: reasons for metrics that were not measured, by name.
        tasks: scores of lm-evaluation-harness, by `TASK: METRIC`.
        varied: results of counterfactual prompts, if there are any.
    """

    asked: Sequence[Asked]
    answers: list[Generation] = field(default_factory=list)
    judged: list[dict[str, float]] = field(default_factory=list)
    scores: dict[str, Scores] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, HarnessScore] = field(default_factory=dict)
    varied: Measured | None = None


def examine(
    generator: Generator,
    material: Material,
    data: dict[str, Sequence[Piece]],
    settings: CheckConfig,
    lm_eval: LmEvalConfig,
    tell: Callable[[str], None],
) -> Examined:
    """Ask `generator` the prompts of `material`, and let it continue the rows of `data` (train, validation).

    Raises UserError for a prompt that does not fit in the model's context.
    """
    found = Examined([*material.safety, *material.general])
    _ask(generator, found, settings, tell)
    prompts = [one.text for one in spread(material.general, settings.stability_prompts)]
    if prompts:
        tell("the same prompts alone, in a batch, padded, and with other whitespace")
        alone, gaps = in_company(generator, prompts, settings.stability_max_new_tokens)
        found.numbers |= {name: float(np.max(values)) for name, values in gaps.items()}
        found.counts |= dict.fromkeys(gaps, len(prompts))
        lost = [{"whitespace": loss} for loss in whitespace(generator, prompts, alone)]
        found.scores["whitespace"] = means(lost, shares=False)
    else:
        found.missing |= dict.fromkeys(("batch_gap", "padding_gap", "whitespace"), "check.stability_prompts is 0")
    for name, pieces in data.items():
        if pieces:
            tell(f"{len(pieces)} rows of {name} to continue")
            rows = continued(generator, pieces, settings.batch_size)
            for key, label in (("verbatim", "verbatim"), ("run", "longest_run")):
                found.scores[f"{label}_{name}"] = means([{f"{label}_{name}": row[key]} for row in rows])
    tell(f"{len(material.texts)} passages to read")
    _read(generator, material, found, settings)
    if material.varied:
        found.varied = measure(
            generator, material.varied, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, tell=tell
        )
        gap = gaps(material.varied, found.varied)
        found.scores |= dict.fromkeys(gap.values(), gap)
    if lm_eval.tasks:
        tell(f"lm-evaluation-harness: {', '.join(lm_eval.tasks)}")
        from ftjax.evaluate.lm_eval.command import run_tasks  # lm_eval takes long to import

        ran = run_tasks(generator, lm_eval, limit=settings.limit, batch_size=settings.batch_size)
        found.tasks = {f"{one.task}: {one.metric}": one for one in harness_scores(ran)}
    if prompts and settings.speed_runs:
        tell("speed of generation")
        found.numbers |= speed(generator, prompts, settings.stability_max_new_tokens, settings.speed_runs)
    else:
        why = f"check.{'speed_runs' if prompts else 'stability_prompts'} is 0"
        found.missing |= dict.fromkeys(("first_token_seconds", "tokens_per_second"), why)
    return found


def _ask(generator: Generator, found: Examined, settings: CheckConfig, tell: Callable[[str], None]) -> None:
    tell(f"{len(found.asked)} prompts")
    found.answers = generator.generate(
        [one.text for one in found.asked], max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
        progress=lambda done, tokens: tell(f"{done} of {len(found.asked)} prompts, {tokens:,} tokens"),
    )  # fmt: skip
    try:
        language = languages()
    except ImportError:
        language = None
        found.missing["wrong_language"] = "it needs py3langid, which is not installed; pip install 'ftjax[eval]'"
    found.judged = judge(found.asked, found.answers, language)
    found.scores |= shares(found.judged)
    if "wrong_language" not in found.scores:
        found.missing.setdefault("wrong_language", "no answer is long and clear enough to detect its language")
    if "safe_refused" not in found.scores:
        why = "no safety prompts; give --prompts FILE with the columns prompt and label (safe or unsafe)"
        found.missing |= dict.fromkeys(("safe_refused", "unsafe_refused"), why)


def _read(generator: Generator, material: Material, found: Examined, settings: CheckConfig) -> None:
    how: dict[str, Any] = {"max_length": min(TEXT_LENGTH, generator.context), "truncation": "split"}
    documents = encode(material.texts, generator.tokenizer, DataConfig(train="-", **how))
    flat = [piece for pieces in documents for piece in pieces]
    if not flat:
        found.missing["perplexity"] = "no passage has two tokens"
        return
    read = iter(likelihoods(generator, flat, settings.batch_size))
    each = loss([[next(read) for _ in pieces] for pieces in documents])
    found.scores["perplexity"] = Scores(
        each.each, each.statistics, lambda sums: {"perplexity": each.combine(sums)["perplexity"]}
    )  # fmt: skip
