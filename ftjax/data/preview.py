"""`ftjax preview`: shows the data as the model will see it, before any training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.config import Config
from ftjax.console import say
from ftjax.data.encoder import Encoded
from ftjax.data.encoding import ANSWERS, RowEncoding
from ftjax.data.pipeline import Split, load_splits
from ftjax.data.preview_html import write_html
from ftjax.data.report import DataReport, histogram
from ftjax.errors import UserError, printable

EXAMPLES = 3
LONGEST = 400  # most tokens of an example that the terminal shows
BAR = 40  # characters


@dataclass(frozen=True)
class Shown:
    """One document, token by token: the text of each token (together they are the document's text), its weight and its
    place."""

    where: str
    ids: list[int]
    texts: list[str]
    weights: list[float]
    row: int | None  # of the first epoch
    segment: int | None


def preview(
    config: Config, tokenizer: Any, *, html: Path | None = None, as_json: bool = False, console: Any, examples: int = EXAMPLES,
    positions: int | None = None, embeddings: int | None = None, encoding: RowEncoding = ANSWERS,
) -> None:  # fmt: skip
    """Print (or write) the first examples with their trained tokens, the counts, a histogram of lengths, and warnings.

    Args:
        html: a file to write the same to, with a chart.
        as_json: print one JSON object instead.
        console: a `rich.console.Console`.
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
    if as_json:
        print(json.dumps(as_object(shown, sets), ensure_ascii=False))
        return
    for number, example in enumerate(shown):
        print_example(console, example, number)
    for name, split in sets.items():
        print_report(console, name, split.report, histogram(split.lengths))
    if html is not None:
        say(console, f"written: {html}")


def show_examples(split: Split, tokenizer: Any, count: int = EXAMPLES, encoding: RowEncoding = ANSWERS) -> list[Shown]:
    """Return the first `count` documents of a set; for a document that ends with labels, the last token shows them as
    words."""
    found = [(document, shown(document, tokenizer, *place)) for document, place in split.first(count)]
    for document, item in found:
        if (words := encoding.label_text(document)) is not None:
            item.texts[-1] = f" -> {words}"
    return [item for _, item in found]


def shown(document: Encoded, tokenizer: Any, row: int | None = None, segment: int | None = None) -> Shown:
    ids = document.tokens.tolist()
    return Shown(document.where, ids, token_texts(ids, tokenizer), document.weights.tolist(), row, segment)


def token_texts(ids: list[int], tokenizer: Any) -> list[str]:
    """Return the text of each token, so that they join to the decoded text. A token that holds part of a character is
    empty; the token that completes the character holds it."""
    texts: list[str] = []
    # Decoding begins a few tokens earlier, at a character boundary: a token's text depends on those before it.
    begins, before, last = [0], "", 0
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[begins[0] : end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if whole.endswith("\ufffd") and end < len(ids) and end - last < 32:
            texts.append("")
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else whole)
        begins, last = [*begins, end][-4:], end
        before = tokenizer.decode(ids[begins[0] : end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts


def render_example(document: Encoded, tokenizer: Any) -> str:
    """Render one document as text with trained parts in [[ and ]]; the middle of a long one is left out."""
    item, parts, inside = shown(document, tokenizer), [], False
    skipped = len(item.ids) - LONGEST
    for number, (text, weight) in enumerate(zip(item.texts, item.weights, strict=True)):
        if skipped > 0 and LONGEST // 2 <= number < LONGEST // 2 + skipped:
            text = f" [... {skipped:,} tokens ...] " if number == LONGEST // 2 else ""
        now = weight > 0
        if now != inside:
            parts.append("[[" if now else "]]")
            inside = now
        parts.append(printable(text))
    return "".join(parts) + ("]]" if inside else "")


def as_object(shown: list[Shown], sets: dict[str, Split]) -> dict[str, Any]:
    """Return everything as JSON."""
    return {
        "examples": [
            {
                "where": item.where, "row": item.row, "segment": item.segment,
                "tokens": item.ids, "texts": item.texts, "weights": item.weights, "trained": [w > 0 for w in item.weights],
            }
            for item in shown
        ],
        **{
            name: {
                **split.report.state(),
                "histogram": [{"from": a, "to": b, "documents": n} for a, b, n in histogram(split.lengths)],
            }
            for name, split in sets.items()
        },
    }  # fmt: skip


def print_example(console: Any, item: Shown, number: int) -> None:
    from rich.text import Text

    place = f", row {item.row}, segment {item.segment}" if item.row is not None else ""
    trained = int(np.count_nonzero(np.array(item.weights[1:])))
    head = f"example {number + 1}: {item.where}: {len(item.ids):,} tokens, {trained:,} trained{place}"
    say(console, head, "bold reverse")
    line = Text()
    for at, (text, weight) in enumerate(zip(item.texts, item.weights, strict=True)):
        if at == LONGEST:
            line.append(f" ... {len(item.ids) - at:,} more tokens", "italic dim")
            break
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
