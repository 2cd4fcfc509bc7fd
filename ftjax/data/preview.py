"""What the data looks like to the model."""

from typing import Any

from ftjax.data.template import Encoded


def render_example(document: Encoded, tokenizer: Any) -> str:
    """One document as text, with what is trained between [[ and ]]."""
    parts, inside = [], False
    start = 0
    for number in range(len(document.tokens) + 1):
        now = number < len(document.tokens) and document.weights[number] > 0
        if now != inside or number == len(document.tokens):
            text = tokenizer.decode(document.tokens[start:number])
            parts.append(f"[[{text}]]" if inside else text)
            start, inside = number, now
    return "".join(parts)
