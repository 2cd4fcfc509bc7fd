"""Personal data and secrets in texts: found by patterns and check digits, told by place and kind, never printed whole.

Each kind has a pattern and, where the data has one, a check: Luhn's digit of card numbers (ISO/IEC 7812-1), the remainder
modulo 97 of IBANs (ISO 13616), country codes and lengths of phone numbers (ITU-T E.164; the North American numbering plan), the
numbers that the US never issues as social security numbers. Keys are known by the prefixes that their issuers document.

What has neither a form nor a check is not found: names, addresses, dates of birth, health. A scan without a finding does not
show that data is free of personal data, and a number with the right digit may be a product's.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ftjax.config.data import DataConfig
from ftjax.data.faults import Faults
from ftjax.data.read import read_rows

MOST, STREAMED = 100_000, 2_000  # rows of a set that are scanned
SHOWN = 20  # findings that are listed


@dataclass(frozen=True)
class Kind:
    """A kind of personal data. Attributes: check: whether a match is one."""

    name: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool] = lambda text: True


@dataclass(frozen=True)
class Finding:
    """One finding: where the row is, the column, and a part of the text, masked."""

    kind: str
    where: str
    column: str
    masked: str


@dataclass
class Scan:
    """Result of a scan. Attributes: rows: rows that were read; found: how many rows have each kind; first: some of them."""

    rows: int = 0
    found: Counter[str] = field(default_factory=Counter)
    first: list[Finding] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return lines for display; empty if nothing was found."""
        if not self.found:
            return []
        counts = ", ".join(f"{kind} in {count:,} row{'s' * (count > 1)}" for kind, count in self.found.most_common())
        lines = [f"personal data in {self.rows:,} rows: {counts}; data.personal_data: mask trains placeholders instead"]
        lines += [f"  {one.where}: {one.kind} in {one.column}: {one.masked}" for one in self.first]
        more = sum(self.found.values()) - len(self.first)
        return [*lines, f"  and {more:,} more"] if more > 0 else lines

    def state(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {"rows": self.rows, "found": dict(self.found), "first": [vars(one) for one in self.first]}


def luhn(text: str) -> bool:
    """Return whether the last digit is Luhn's check digit of the others."""
    digits = [int(c) for c in reversed(text) if c.isdigit()]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


# Prefixes and lengths of issuers' numbers.
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|"
    r"3[068]\d{12}|(?:6011|64[4-9]\d|65\d\d|35\d\d)\d{12,15}"
)


def _card(text: str) -> bool:
    """Return whether a number has the prefix and length of a payment card, and Luhn's digit."""
    digits = re.sub(r"\D", "", text)
    return bool(_ISSUERS.fullmatch(digits)) and len(set(digits)) > 1 and luhn(digits)


def _iban(text: str) -> bool:
    """Return whether the number modulo 97 is 1, with letters as 10 to 35 and the first four characters last."""
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


# Country codes of E.164; those of two digits that are not listed begin one of three.
_COUNTRIES = re.compile(
    r"\+(?:1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-689]\d|3[578]\d|42\d|5[09]\d|6[789]\d|85\d|88\d|96\d|97\d|99\d)"
)


def _phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    if text.startswith("+"):
        return 8 <= len(digits) <= 15 and bool(_COUNTRIES.match(text)) and len(set(digits)) > 2
    return len(digits) == 10 and digits[0] not in "01" and digits[3] not in "01" and digits[1:3] != "11"


def _social(text: str) -> bool:
    area, group, serial = text.split("-")
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


KINDS = (
    Kind(
        "key",
        re.compile(
            r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----(?:[^-]*-----END (?:[A-Z]+ )?PRIVATE KEY-----)?|"
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|"
            r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{40,}\b|\bglpat-[A-Za-z0-9_-]{20,}|\bhf_[A-Za-z]{30,}\b|"
            r"\bsk-(?:ant-|proj-)?[A-Za-z0-9_-]{32,}|\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\bAIza[0-9A-Za-z_-]{35}|"
            r"\b[rs]k_live_[0-9A-Za-z]{20,}|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
        ),
    ),
    Kind(
        "email",
        re.compile(r"\b[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}\b"),
    ),
    Kind("iban", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    Kind(
        "card",  # in one piece, or in groups of four, or as American Express writes it
        re.compile(
            r"(?<![\d.,-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{4,5})(?!\d|[.,]\d)"
        ),
        _card,
    ),
    Kind("social security number", re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])"), _social),
    Kind(
        "phone",
        re.compile(
            r"(?<![\w+.])\+\d{1,3}(?:[ ./-]?\(?\d{1,4}\)?){2,6}(?!\w)|"
            r"(?<![\w+./-])(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![\w-])"
        ),
        _phone,
    ),
)


def find(text: str) -> Iterator[tuple[Kind, re.Match[str]]]:
    """Yield what a text has, without overlaps; kinds that stand first in `KINDS` take precedence."""
    taken: list[tuple[int, int]] = []
    for kind in KINDS:
        for match in kind.pattern.finditer(text):
            start, stop = match.span()
            if kind.check(match[0]) and not any(start < b and a < stop for a, b in taken):
                taken.append((start, stop))
                yield kind, match


def mask(text: str) -> str:
    """Return the text with a placeholder such as `[EMAIL]` for each finding."""
    found = sorted(((match.span(), kind.name) for kind, match in find(text)), reverse=True)
    for (start, stop), name in found:
        text = f"{text[:start]}[{name.upper().replace(' ', '_')}]{text[stop:]}"
    return text


def hint(text: str) -> str:
    """Return the beginning of a finding and its length; at most a quarter of it is shown."""
    return f"{text[: min(3, len(text) // 4)]}… ({len(text)} characters)"


def scan(config: DataConfig) -> Scan:
    """Scan the rows of the training and validation data, at most `MOST` of each set (`STREAMED` if they are streamed).

    Raises UserError for rows that cannot be read, unless `data.on_error` skips them.
    """
    found = Scan()
    for source in (*config.sources("train"), *config.sources("validation")):
        rows = read_rows(source, Faults(config.on_error == "skip"), streaming=config.streaming)
        for row in islice(rows, STREAMED if config.streaming else MOST):
            found.rows += 1
            kinds = set()
            for column, text in _texts(row.values):
                for kind, match in find(text):
                    if kind.name not in kinds and len(found.first) < SHOWN:
                        found.first.append(Finding(kind.name, row.where, column, hint(match[0])))
                    kinds.add(kind.name)
            found.found.update(kinds)
    return found


def _texts(values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield every text of a row with its column, those in messages too."""
    for column, value in values.items():
        waiting = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                yield column, one
            elif isinstance(one, Mapping):
                waiting += one.values()
            elif isinstance(one, list | tuple) and one and not isinstance(one[0], int | float):
                waiting += one
