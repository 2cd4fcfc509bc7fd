"""Tests of personal data in rows: what is found, what is not, what is shown of it, and what `mask` trains."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ftjax
from ftjax.config import Config
from ftjax.data.clean import normalizer
from ftjax.data.personal import SHOWN, find, hint, luhn, mask, scan

EMAIL = "jo.doe+x@mail.example.co.uk"


@pytest.mark.parametrize("text, masked", [
    (f"mail {EMAIL}.", "mail [EMAIL]."),
    ("call +49 30 901820 or +442079460958", "call [PHONE] or [PHONE]"),
    ("(212) 555-0123, 212-555-0123", "[PHONE], [PHONE]"),
    ("4111 1111 1111 1111 and 5500-0000-0000-0004", "[CARD] and [CARD]"),
    ("DE89 3704 0044 0532 0130 00, GB82WEST12345698765432", "[IBAN], [IBAN]"),
    ("key AKIAIOSFODNN7EXAMPLE", "key [KEY]"),
    (f"ghp_{'a' * 36} hf_{'b' * 34} sk-{'c1' * 20}", "[KEY] [KEY] [KEY]"),
    ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "[KEY]"),
    ("ssn 123-45-6789", "ssn [SOCIAL_SECURITY_NUMBER]"),
])  # fmt: skip
def test_what_is_found(text, masked):
    assert mask(text) == masked


@pytest.mark.parametrize("text", [
    "4111 1111 1111 1112",  # Luhn
    "1234567890123456", "0000 0000 0000 0000",  # no issuer
    "DE89 3704 0044 0532 0130 01",  # modulo 97
    "000-12-3456", "666-12-3456", "912-34-5678", "123-00-6789",  # never issued
    "pi is 3.14159265358979323846", "2026-11-30 14:22:11", "192.168.100.200", "1,234,567,890,123", "v1.2.3",
    "+12345", "2+3=5", "111-555-0123", "a@b", "user@host and @name", "task sk-1", "a.a.a." * 2000,
])  # fmt: skip
def test_what_is_not_found(text):
    assert list(find(text)) == []


@given(st.integers(10**13, 10**14 - 1))
def test_luhn_sees_one_wrong_digit(number):
    right = next(f"{number}{digit}" for digit in range(10) if luhn(f"{number}{digit}"))
    assert not luhn(f"{right[:5]}{(int(right[5]) + 1) % 10}{right[6:]}")


@given(st.text())
def test_a_masked_text_has_nothing_left(text):
    assert not list(find(mask(f"{text} {EMAIL} {text}")))


def test_no_more_than_a_quarter_is_shown():
    assert hint(EMAIL) == "jo.… (27 characters)" and hint("1234") == "1… (4 characters)"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_named_with_their_place(tmp_path):
    path = write(
        tmp_path / "a.jsonl", {"prompt": "Hi", "completion": "Ho"},
        {"messages": [{"role": "user", "content": f"I am {EMAIL}, {EMAIL}"}, {"role": "assistant", "content": "No"}]},
        *({"prompt": f"Pay {n} 4111111111111111", "completion": "ok"} for n in range(30)),
    )  # fmt: skip
    found = scan(Config.model_validate({"model": {"path": "x"}, "data": {"train": str(path)}}).data)
    assert (found.rows, dict(found.found)) == (32, {"email": 1, "card": 30})
    assert (found.first[0].where, found.first[0].column) == (f"{path}:2", "messages") and len(found.first) == SHOWN
    lines = "\n".join(found.lines())
    assert "card in 30 rows, email in 1 row" in lines and "and 11 more" in lines
    assert EMAIL not in lines and "4111111111111111" not in lines and EMAIL not in json.dumps(found.state())


@pytest.mark.parametrize("how", ["keep", "mask"])
def test_preview_reports_and_mask_trains_placeholders(how, tmp_path, untrained, capsys):
    rows = [{"prompt": f"Who is {n}?", "completion": f"Ask {EMAIL}"} for n in range(3)]
    config = {"model": {"path": str(untrained)}, "data": {"train": rows, "personal_data": how}}
    seen = ftjax.preview(config, examples=1)
    assert seen["personal_data"]["found"] == {"email": 3}
    text = "".join(seen["examples"][0]["texts"])
    assert ("[EMAIL]" in text, "mail.example" in text) == (how == "mask", how == "keep")


def test_masks_and_unicode_forms_go_together():
    data = {"train": "x", "personal_data": "mask", "unicode_normalization": "NFKC"}
    change = normalizer(Config.model_validate({"model": {"path": "x"}, "data": data}).data)
    assert change(f"\uff21 {EMAIL}") == "A [EMAIL]"
    assert normalizer(Config.model_validate({"model": {"path": "x"}, "data": {"train": "x"}}).data) is None
