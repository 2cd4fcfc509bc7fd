"""Metrics of metrics.jsonl, as charts and as tables."""

from collections.abc import Iterable

from ftjax.page.chart import line_chart
from ftjax.page.document import details, table
from ftjax.report.read import Run

RATE = "tokens per second"
PICTURES = (
    ("loss", {"training": "train/loss", "validation": "eval/loss"}),
    ("divergence from the teacher (nats)", {"training": "train/divergence", "validation": "eval/divergence"}),
    ("cross-entropy of the data's answers (nats)", {"training": "train/cross_entropy", "validation": "eval/cross_entropy"}),
    ("reward", {"training": "train/reward", "validation": "eval/reward"}),
    ("share of prompts whose answers are all rewarded alike", {"share": "train/frac_reward_zero_std"}),
    ("tokens of an answer", {"training": "train/completions/mean_length", "validation": "eval/completions/mean_length"}),
    ("share of answers that are cut off", {"training": "train/completions/clipped_ratio"}),
    ("entropy of the next token (nats)", {"entropy": "train/entropy"}),
    ("log-probabilities: sampler against trainer", {"mean difference": "train/rollout/logprob_gap"}),
    ("share of tokens whose ratio is clipped", {"share": "train/clip_ratio/region_mean"}),
    ("seconds of an update: answers", {"rollout": "train/time/rollout"}),
    ("seconds of an update: rewards", {"reward": "train/time/reward"}),
    ("seconds of an update: training step", {"update": "train/time/update"}),
    ("learning rate", {"learning rate": "train/learning_rate"}),
    ("token accuracy on validation data", {"accuracy": "eval/token_accuracy"}),
    ("gradient norm", {"gradient norm": "train/grad_norm"}),
    (RATE, {RATE: "train/tokens_per_second"}),
    ("share of the chips' peak (MFU)", {"MFU": "train/mfu"}),
    ("peak memory of one device (GiB; of the process, on a CPU)", {"GiB": "train/peak_memory_gib"}),
)
DRAWN = {name for _, series in PICTURES for name in series.values()}
NOT_DRAWN = ("eval/perplexity", "eval/seconds")  # the loss again, and no curve


def curves(run: Run) -> Iterable[str]:
    """Return the HTML of the charts and tables."""
    if not run.metrics:
        return ["<p>There is no metric yet.</p>"]
    pictures = [(title, {label: run.curve(name) for label, name in series.items()}) for title, series in PICTURES]
    for _, series in pictures:
        if RATE in series:
            series[RATE] = [(step, rate) for step, rate in series[RATE] if rate > 0]  # 0 means unknown
    each = [name for name in run.names("train/rewards/") if name.endswith("/mean")]
    if len(each) > 1:
        pictures += [(f"reward {name.split('/')[2]}", {"mean": run.curve(name)}) for name in each]
    others = [name for name in run.names("eval/") if name not in DRAWN and name not in NOT_DRAWN]
    pictures += [(name.removeprefix("eval/"), {name: run.curve(name)}) for name in others]
    shown = "".join(line_chart(title, series) for title, series in pictures)
    return [f'<div class="charts">{shown}</div>', *(_rows(run, prefix, title) for prefix, title in SETS)]


SETS = (("train/", "Training, every logged step"), ("eval/", "Validation, every evaluation"))


def _rows(run: Run, prefix: str, title: str) -> str:
    names = run.names(prefix)
    rows = [row for row in run.metrics if any(name in row for name in names)]
    if not rows:
        return ""
    head = ["step", *(name.removeprefix(prefix) for name in names)]
    cells = [[str(row["step"]), *(f"{row[name]:.6g}" if name in row else "" for name in names)] for row in rows]
    return details(f"{title}: {len(rows):,} rows", table(head, cells, caption=f"From metrics.jsonl, {prefix}*"))
