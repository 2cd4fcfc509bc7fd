"""Converts text files to UTF-8 from `data.encoding`, from the encoding of a BOM, or from Excel's cp1252 if the bytes show
it."""

import codecs
import io
import re
from pathlib import Path
from typing import Any, BinaryIO

from ftjax.data.faults import Faults
from ftjax.errors import UserError

BOM = codecs.BOM_UTF8
LONGEST_LINE = 1 << 30  # bytes; a longer line is a file of another kind
LOOKED_AT = 1 << 20  # bytes used to detect an encoding
# In western European text, accented letters occur singly, and symbols do not occur between letters. Other text is in another
# code page, which only the user can name.
NOT_WESTERN = re.compile(
    rb"[\x80-\xff]{3}|[\x81\x8d\x8f\x90\x9d\xfe\xff]"
    rb"|[A-Za-z\xc0-\xfd][\xa1-\xa9\xab-\xb3\xb5\xb6\xb8\xb9\xbb-\xbf\xd7\xf7][A-Za-z\xc0-\xfd]"
)


def as_utf8(file: Any, encoding: str | None) -> BinaryIO:
    """Return the file as UTF-8. Reading it raises UnicodeError if it is not in its encoding."""
    return file if encoding in (None, "utf-8") else io.BufferedReader(_Recoded(file, encoding))


def found_encoding(path: Path, start: bytes, faults: Faults, western: bool) -> str | None:
    """Return the encoding of a file that begins with these bytes (`LOOKED_AT` of them); None for UTF-8.

    Args:
        western: accept bytes that are not UTF-8 as cp1252 if they look like it, and note this in `faults`.
    """
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16, with whose BOM the first one begins
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if western and _is_western(start):
        faults.note(f"{path}: not UTF-8, and read as cp1252 (Excel's); data.encoding names another encoding")
        return "cp1252"
    return None


def _is_western(start: bytes) -> bool:
    if start.isascii():
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return not NOT_WESTERN.search(start)
    return False


class _Recoded(io.RawIOBase):
    """Presents a file in another encoding as UTF-8; line endings stay."""

    def __init__(self, file: Any, encoding: str):
        self._text = io.TextIOWrapper(file, encoding, newline="")
        self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._output:
            self._output = self._text.read(1 << 16).encode()
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size


def decoded(line: bytes, where: str) -> str:
    """Decode a line of UTF-8. Raises UserError for other bytes."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(where, line[error.start])) from None


def not_utf8(where: str, byte: int) -> str:
    return f"{where}: not UTF-8 (byte {byte:#04x}); name its encoding in data.encoding, or convert the file to UTF-8"
