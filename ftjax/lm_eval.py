"""lm-evaluation-harness' own command line with the model `ftjax` registered: `python -m ftjax.lm_eval --model ftjax ...`.

lm_eval finds models only in its registry, which has no entry points, so something must import this model first.
"""

import sys

from ftjax.errors import UserError
from ftjax.evaluate.extra import need


def main() -> None:
    """Run lm_eval with its own options; exit with code 2 if the user's input is wrong."""
    try:
        command = need("lm_eval.__main__", "python -m ftjax.lm_eval")
        need("ftjax.evaluate.lm_eval.harness", "python -m ftjax.lm_eval")  # registers the model
        command.cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
