"""`ftjax preview`: shows the data as the model will see it, before any training."""

import json
from pathlib import Path
from typing import Any

from ftjax.config import Config
from ftjax.console import say
from ftjax.data.encoding import ANSWERS, RowEncoding
from ftjax.data.personal import Scan, scan
from ftjax.data.pipeline import Split, load_splits
from ftjax.data.preview_html import write_html
from ftjax.data.report import DataReport, histogram
from ftjax.data.shown import LONGEST, Shown, show_unit
from ftjax.errors import UserError, printable

EXAMPLES = 3
PART = "‖"  # stands where the documents of a row part
BAR = 40  # characters


def preview(
    config: Config, tokenizer: Any, *, html: Path | None = None, as_json: bool = False, console: Any = None,
    examples: int = EXAMPLES, positions: int | None = None, embeddings: int | None = None, encoding: RowEncoding = ANSWERS,
) -> dict[str, Any]:  # fmt: skip
    """Print (or write) the first examples with their trained tokens, the counts, a histogram of lengths, and warnings.

    Returns everything as JSON.

    Args:
        html: a file to write the same to, with a chart.
        as_json: print one JSON object instead.
        console: a `rich.console.Console`; None prints nothing.
        positions: the longest text in tokens that the model was made for, if known.
        embeddings: the number of the model's embeddings, if known: a token id beyond them is an error.
        encoding: how the objective's rows become documents.

    Raises UserError for anything that is wrong with the data, or if `html` cannot be written.
    """
    train, validation = load_splits(config.data, tokenizer, seed=config.training.seed, encoding=encoding, positions=positions)
    for split in (train, validation):
        if split is not None and embeddings is not None:
            split.refuse_unknown(embeddings, tokenizer)
    shown = show_examples(train, tokenizer, examples, encoding)
    sets = {"train": train, **({"validation": validation} if validation is not None else {})}
    if html is not None:
        try:
            write_html(html, shown, {name: (split.report, histogram(split.lengths)) for name, split in sets.items()})
        except OSError as error:
            raise UserError(f"{html}: cannot be written: {error.strerror or error}") from None
    personal = scan(config.data)
    found = {**as_object(shown, sets), "personal_data": personal.state()}
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    if as_json or console is None:
        return found
    for number, example in enumerate(shown):
        print_example(console, example, number)
    for name, split in sets.items():
        print_report(console, name, split.report, histogram(split.lengths))
    for line in personal_lines(personal, config):
        say(console, line, "yellow")
    if html is not None:
        say(console, f"written: {html}")
    return found


def personal_lines(personal: Scan, config: Config) -> list[str]:
    """Return lines about personal data in the rows."""
    if config.data.personal_data == "mask" and personal.found:
        return [f"personal data in {personal.rows:,} rows is masked: {', '.join(personal.found)}"]
    return personal.lines()


def show_examples(split: Split, tokenizer: Any, count: int = EXAMPLES, encoding: RowEncoding = ANSWERS) -> list[list[Shown]]:
    """Return the documents of the first `count` rows of a set."""
    return [show_unit(unit, tokenizer, encoding, *place) for unit, place in split.first(count)]


def as_object(shown: list[list[Shown]], sets: dict[str, Split]) -> dict[str, Any]:
    """Return everything as JSON."""
    return {
        "examples": [
            {
                "example": number, "caption": item.caption, "parts_at": item.parts_at,
                "where": item.where, "row": item.row, "segment": item.segment,
                "tokens": item.ids, "texts": item.texts, "weights": item.weights, "trained": [w > 0 for w in item.weights],
            }
            for number, items in enumerate(shown)
            for item in items
        ],
        **{
            name: {
                **split.report.state(),
                "histogram": [{"from": a, "to": b, "documents": n} for a, b, n in histogram(split.lengths)],
            }
            for name, split in sets.items()
        },
    }  # fmt: skip


def print_example(console: Any, items: list[Shown], number: int) -> None:
    """Print the documents of a row; the second of two from where it differs from the first."""
    for other, item in enumerate(items):
        place = f", row {item.row}, segment {item.segment}" if item.row is not None else ""
        caption = f", {item.caption}" if item.caption else ""
        head = f"example {number + 1}{caption}: {item.where}: {len(item.ids):,} tokens, {item.trained:,} trained{place}"
        say(console, head, "bold reverse")
        begin = max(0, (item.parts_at or 0) - LONGEST // 2) if len(item.ids) > LONGEST else 0
        start = item.parts_at if other else begin
        _print_tokens(console, item, start, "as above" if other else "before")
    if items[-1].parts_at is not None:
        firsts = " | ".join(repr(printable("".join(item.texts[item.parts_at :][:1]))) for item in items)
        say(console, f"they part ({PART}) at token {items[-1].parts_at:,}: {firsts}")


def _print_tokens(console: Any, item: Shown, start: int, what: str) -> None:
    from rich.text import Text

    line = Text()
    if start:
        line.append(f"... {start:,} tokens {what} ", "italic dim")
    for at, (text, weight) in enumerate(zip(item.texts, item.weights, strict=True)):
        if at < start:
            continue
        if at == start + LONGEST:
            line.append(f" ... {len(item.ids) - at:,} more tokens", "italic dim")
            break
        if at == item.parts_at:
            line.append(PART, "bold red")
        colour = "green" if weight == 1 else "yellow" if weight > 0 else "bright_black"
        line.append(_visible(text), f"{colour}{'' if at % 2 else ' underline' if weight > 0 else ''}")
        if weight not in (0.0, 1.0):
            line.append(f"({weight:g})", "yellow dim")
    console.print(line, soft_wrap=not console.is_terminal)
    if not console.color_system:  # without colour, marks show what is trained
        say(console, "trained: " + " | ".join(_trained_texts(item)))


def _trained_texts(item: Shown) -> list[str]:
    texts, inside = [], False
    for text, weight in zip(item.texts, item.weights, strict=True):
        if weight > 0:
            texts[len(texts) - inside :] = [(texts[-1] if inside else "") + _visible(text)]
        inside = weight > 0
    return texts


def _visible(text: str) -> str:
    return printable(text.replace("\n", "⏎\n").replace("\t", "⇥\t"))


def print_report(console: Any, name: str, report: DataReport, bins: list[tuple[int, int, int]]) -> None:
    """Print the counts, a table of dropped rows, and a histogram of token lengths."""
    say(console, name, "bold reverse")
    for line in report.lines():
        say(console, line, "yellow" if line.startswith("warning") else "")
    most = max((count for _, _, count in bins), default=1)
    wide = len(f"{bins[-1][1]:,}") if bins else 1
    say(console, "tokens a document")
    for low, high, count in bins:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        say(console, f"  {low:>{wide},} - {high:>{wide},}  {bar} {count:,}")
    quantiles = ", ".join(f"{name} {value:,}" for name, value in report.length_quantiles.items())
    say(console, f"  {quantiles}")
