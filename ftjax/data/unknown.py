"""Token ids without an embedding: the tokenizer is larger than the model's, or belongs to another model."""

from typing import Any

import numpy as np

from ftjax.errors import UserError


def refuse_unknown(tokens: np.ndarray, rows: int, where: str, tokenizer: Any) -> None:
    """Raise UserError if an id is not below `rows`, the number of the model's embeddings; `where` names the data row.

    The lookup of such an id would silently give NaN or the embedding of another token.
    """
    beyond = tokens[tokens >= rows]
    if len(beyond):
        number = int(beyond[0])
        text = tokenizer.convert_ids_to_tokens(number)
        raise UserError(
            f"{where}: the token {text!r} has the id {number}, and the model has embeddings for 0 to {rows - 1} only. Use the "
            f"tokenizer that belongs to the model (model.tokenizer), or give the token an embedding of its own with "
            f"model.add_special_tokens: [{text!r}], and a method that trains it"
        )
