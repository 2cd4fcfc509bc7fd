"""Tasks that count shared words or characters: bleu and chrf by sacrebleu, rouge by rouge-score."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from ftjax.config import EvaluateConfig
from ftjax.evaluate.extra import need
from ftjax.evaluate.rows import Item
from ftjax.evaluate.statistic import Scores, means


def bleu(items: Sequence[Item], answers: Sequence[str], config: EvaluateConfig) -> Scores:
    """Score corpus BLEU, 0 to 100 (Papineni et al. 2002; Post 2018, arXiv:1804.08771), with sacrebleu's defaults."""
    metrics = need("sacrebleu", "evaluate.task bleu").metrics
    return _corpus("bleu", metrics.BLEU(), metrics.BLEU(effective_order=True), items, answers)


def chrf(items: Sequence[Item], answers: Sequence[str], config: EvaluateConfig) -> Scores:
    """Score corpus chrF2, 0 to 100 (Popovic 2015), with sacrebleu's defaults."""
    metric = need("sacrebleu", "evaluate.task chrf").metrics.CHRF()
    return _corpus("chrf", metric, metric, items, answers)


def _corpus(name: str, metric: Any, of_sentence: Any, items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """Score a corpus; `of_sentence` scores the single rows to show."""
    streams = list(zip_longest(*(item.references for item in items)))  # None for rows with fewer references
    statistics = np.array(metric._extract_corpus_statistics(list(answers), streams), np.float64)

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.rint(sums).astype(np.int64).tolist()
        return {name: np.array([metric._compute_score_from_stats(row).score for row in rows])}

    each = [
        {name: of_sentence.sentence_score(answer, list(item.references)).score}
        for item, answer in zip(items, answers, strict=True)
    ]
    return Scores(each, statistics, combine)


def rouge(items: Sequence[Item], answers: Sequence[str], config: EvaluateConfig) -> Scores:
    """Score ROUGE F measures, 0 to 1 (Lin 2004), by rouge-score; the best over several references."""
    module = need("rouge_score.rouge_scorer", "evaluate.task rouge")
    scorer = module.RougeScorer(config.rouge_types, use_stemmer=config.rouge_stemmer)
    found = []
    for item, answer in zip(items, answers, strict=True):
        scores = scorer.score_multi(list(item.references), answer)
        found.append({name: float(scores[name].fmeasure) for name in config.rouge_types})
    return means(found)
