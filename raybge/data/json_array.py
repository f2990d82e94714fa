"""Read a JSON array element by element, in bounded memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

import pyarrow as pa

from raybge.data.groups import RowError
from raybge.data.source_files import BUFFER

# characters of an array element above which it is considered broken: bounds the memory
LONGEST_ELEMENT = 256 << 20
_BLANK = re.compile(r"[ \t\r\n]*")


def read_constant(name: str) -> None:
    """Return null for NaN and infinite numbers, which JSON lacks and other programs write: an error where it is read.

    Args:
        name: "NaN", "Infinity" or "-Infinity".
    """


JSON = json.JSONDecoder(parse_constant=read_constant)


def utf8_text(text: str) -> str | RowError:
    """Return the text; an error if it has a lone surrogate, with which `array_elements` marks invalid UTF-8 bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        return RowError("", f"must be UTF-8 text, found byte 0x{ord(text[err.start]) & 0xFF:02x}")
    return text


class _Window:
    """Sliding window over a long JSON text: `text` from `at` on has not been consumed."""

    def __init__(self, stream: pa.NativeFile):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.text = ""
        self.at = 0

    def fill(self) -> bool:
        """Drop the consumed text and read more, twice as much after each call without progress; False at the end."""
        self.text, self.at = self.text[self.at :], 0
        data = self.stream.read(max(BUFFER, len(self.text)))
        self.text += self.decoder.decode(data, final=not data)
        return bool(data)

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end."""
        while True:
            self.at = _after_space(self.text, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                return ""

    def element(self) -> str | RowError:
        """Return the text of the next JSON value on one line.

        A value is complete only if the comma or bracket after it has been read.
        """
        self.peek()
        wrong = ""
        while True:
            try:
                _, end = JSON.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as err:
                wrong = getattr(err, "msg", str(err))
            else:
                after = _after_space(self.text, end)
                mark = self.text[after : after + 1]
                if mark and mark in ",]":
                    value, self.at = self.text[self.at : end], end
                    return value.replace("\n", " ").replace("\r", " ")
                wrong = "the array is not closed"
                if mark and (mark not in ".eE" or len(self.text) - after > 2):  # else a number may continue
                    break
            if len(self.text) - self.at > LONGEST_ELEMENT or not self.fill():
                break
        return RowError("", f"must be a JSON object in a whole JSON array, found text that is not JSON ({wrong})")


def _after_space(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def array_elements(stream: pa.NativeFile) -> Iterator[tuple[int, str | RowError]]:
    """Yield (number, JSON text on one line) of each element of a JSON array.

    Bytes that are not UTF-8 become lone surrogates. An error ends the iteration: the next element cannot be located.
    """
    window = _Window(stream)
    window.peek()
    window.at += 1
    number = 0
    if window.peek() == "]":
        window.at += 1
    else:
        mark = ","
        while mark == ",":
            text = window.element()
            yield number, text
            if isinstance(text, RowError):
                return
            number += 1
            mark = window.peek()
            window.at += 1
    if window.peek():
        yield number, RowError("", 'must not follow the closing "]" of the JSON array')
