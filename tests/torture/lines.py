"""Hostile input lines and what becomes of each: sent as written, or refused with a reason."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A line without its end. `reason` is part of what is said of it, None where it is sent as written."""

    id: str
    data: bytes
    reason: str | None = None


def openai_line(name: str, value: bytes = b"1") -> bytes:
    """Return a line in OpenAI's batch dialect that says its name, with a value in its body, written as given."""
    body = b'{"model":"gpt-6-luna","messages":[{"role":"user","content":%s}],"value":%s}' % (_quoted(name), value)
    return b'{"custom_id":%s,"method":"POST","url":"/v1/chat/completions","body":%s}' % (_quoted(name), body)


def anthropic_line(name: str, value: bytes = b"1") -> bytes:
    """Return the same in Anthropic's dialect."""
    body = b'{"model":"claude-haiku-5-5","max_tokens":5,"messages":[{"role":"user","content":%s}],"value":%s}'
    return b'{"custom_id":%s,"params":%s}' % (_quoted(name), body % (_quoted(name), value))


def exactly(data: bytes) -> Any:
    """Parse JSON so that equal means the same: order and repetition of keys, kind of each number, all its bits.

    A number with a point or an exponent is the IEEE double that it names, an integer is itself.
    """
    return json.loads(data, object_pairs_hook=_Pairs, parse_float=_double, parse_constant=_no_constant)


class _Pairs(list[tuple[str, Any]]):
    """An object as its pairs, in order: never equal to an array, and like a mapping for tests."""

    def __getitem__(self, name: Any) -> Any:
        return dict(self)[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pairs) and list(self) == list(other)


def _double(text: str) -> bytes:
    return struct.pack("<d", float(text))


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _quoted(name: str) -> bytes:
    return json.dumps(name).encode()


def _nested(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * depth + b"1" + closing * depth


# Values that are sent as they stand, by name. A line nests them three deep: line, body, value.
_KEPT: Mapping[str, bytes] = {
    "U+2028, U+2029 and U+0085 in a string": '"a\u2028b\u2029c\u0085d"'.encode(),
    "DEL and C1 in a string": '"a\x7fb\x9bc"'.encode(),
    "escaped NUL, VT, FF, FS, ESC": rb'"a\u0000\u000b\f\u001c\u001b"',
    "escaped line end": rb'"a\nb\r\nc"',
    "surrogate pair": rb'"\ud83d\ude42"',
    "noncharacters": '"\ufffe\uffff\U0010ffff"'.encode(),
    "bidi and zero width": '"\u202e\u200b\ufeff"'.encode(),
    "what looks like a key in a string": rb'"\"a\":1,\"a\":2"',
    "the same key in two objects": b'[{"a":1},{"a":1}]',
    "keys that differ in case or form": '{"a":1,"A":2,"é":3,"e\u0301":4}'.encode(),
    "__proto__": b'{"__proto__":{"x":1},"constructor":null}',
    "empty key": b'{"":1}',
    "key order": b'{"z":1,"a":2,"m":{"y":1,"b":2}}',
    "white space between tokens": b'{ "a" :\t[ 1 , 2 ]\r}',
    "0": b"0",
    "-0": b"-0",
    "-0.0": b"-0.0",
    "0.0": b"0.0",
    "0e999": b"0e999",
    "1": b"1",
    "1.0": b"1.0",
    "1E5": b"1E5",
    "2^53 + 1": b"9007199254740993",
    "2^63": b"9223372036854775808",
    "-2^63 - 1": b"-9223372036854775809",
    "2^64": b"18446744073709551616",
    "2^70": b"1180591620717411303424",
    "integer of 300 digits": b"7" * 300,
    "1e22": b"1e22",
    "1e23": b"1e23",
    "largest double": b"1.7976931348623157e308",
    "smallest normal double": b"2.2250738585072014e-308",
    "smallest double": b"5e-324",
    "0.1 + 0.2": b"0.30000000000000004",
    "more digits than a double holds": b"0.1000000000000000055511151231257827",
    "half way between two doubles": b"9007199254740993.0",
    "200 digits": b"3." + b"14159265" * 25,
    "depth 198": _nested(198),
    "depth 198 of objects": _nested(198, b'{"a":', b"}"),
}

# Values that nobody may read in more than one way, or that would arrive as others, by name: the reason given.
_REFUSED: Mapping[str, tuple[bytes, str]] = {
    "raw NUL in a string": (b'"a\0b"', "not valid JSON"),
    "raw VT, FF, FS in a string": (b'"a\x0b\x0c\x1cb"', "not valid JSON"),
    "lone CR in a string": (b'"a\rb"', "not valid JSON"),
    "lone high surrogate": (rb'"\ud800"', "not valid JSON"),
    "lone low surrogate": (rb'"\udc00 x"', "not valid JSON"),
    "surrogate in UTF-8": (b'"\xed\xa0\x80"', "not valid JSON"),
    "invalid UTF-8": (b'"\xff"', "not valid JSON"),
    "overlong UTF-8": (b'"\xc0\xaf"', "not valid JSON"),
    "beyond U+10FFFF": (b'"\xf4\x90\x80\x80"', "not valid JSON"),
    "UTF-8 cut off": ('"é'.encode()[:-1] + b'"', "not valid JSON"),
    "Latin-1": ('"é"'.encode("latin-1"), "not valid JSON"),
    "unknown escape": (rb'"\x41"', "not valid JSON"),
    "trailing comma": (b'{"a":1,}', "not valid JSON"),
    "single quotes": (b"{'a':1}", "not valid JSON"),
    "comment": (b"1 // one", "not valid JSON"),
    "NaN": (b"NaN", "not valid JSON"),
    "Infinity": (b"-Infinity", "not valid JSON"),
    "None": (b"None", "not valid JSON"),
    "leading zero": (b"01", "not valid JSON"),
    "plus": (b"+1", "not valid JSON"),
    "bare point": (b".5", "not valid JSON"),
    "hexadecimal": (b"0x1F", "not valid JSON"),
    "1e400": (b"1e400", "not valid JSON: number is infinity"),
    "integer of 5,000 digits": (b"9" * 5_000, "not valid JSON: number is infinity"),
    "1e-400": (b"1e-400", "the number '1e-400' is too small"),
    "-1E-400 beside 0.0": (b"[0.0,-1E-400]", "the number '-1E-400' is too small"),
    "400 zeros and a one": (b"0." + b"0" * 400 + b"1", "is too small"),
    "a key twice": (b'{"a":1,"a":2}', "the key 'a' is given twice"),
    "a key twice, same value": (b'{"a":1,"b":2,"a" : 1}', "the key 'a' is given twice"),
    "a key twice, once escaped": (rb'{"a":1,"\u0061":2}', "the key 'a' is given twice"),
    "a key twice, deep inside": (b'[[{"x":{"a":1,"a":[]}}]]', "the key 'a' is given twice"),
    "a key twice, hidden by an escape": (rb'{"a":1,"a":2,"b":"\u0022:"}', "the key 'a' is given twice"),
    "depth 199": (_nested(199), "nested more than 200 deep"),
    "depth 1,000": (_nested(1_000), "nested more than 200 deep"),
    "depth 1,025": (_nested(1_025), "not valid JSON"),
    "depth 100,000": (_nested(100_000), "not valid JSON"),
    "depth 100,000, unclosed": (b"[" * 100_000, "not valid JSON"),
    "depth 100,000 of objects": (_nested(100_000, b'{"a":', b"}"), "not valid JSON"),
}

# Whole lines that are no request, by name.
_WHOLE: Mapping[str, tuple[bytes, str]] = {
    "NUL": (b"\0", "not valid JSON"),
    "UTF-16": ('{"messages":[]}'.encode("utf-16"), "not valid JSON"),
    "UTF-16 without BOM": ('{"messages":[]}'.encode("utf-16-be"), "not valid JSON"),
    "second BOM": (b"\xef\xbb\xbf" + openai_line("second BOM"), "not valid JSON"),
    "lone CR between two documents": (openai_line("one") + b"\r" + openai_line("two"), "not valid JSON"),
    "two documents": (openai_line("one") + openai_line("two"), "not valid JSON"),
    "document and comma": (openai_line("one") + b",", "not valid JSON"),
    "half a document": (openai_line("one")[:-9], "not valid JSON"),
    "number": (b"1", "a line must be a JSON object, not a number"),
    "string": (b'"messages"', "a line must be a JSON object, not a string"),
    "true": (b"true", "a line must be a JSON object, not a boolean"),
    "null": (b"null", "a line must be a JSON object, not null"),
    "array": (b"[" + openai_line("one") + b"]", "a line must be a JSON object, not an array"),
    "empty object": (b"{}", "the line has no messages"),
    "a key twice at the top": (b'{"custom_id":"x",' + openai_line("one")[1:], "'custom_id' is given twice"),
    "body is text": (b'{"custom_id":"x","url":"/v1/chat/completions","body":"{}"}', "body must be an object"),
    "a misspelt key": (b'{"custmo_id":"x",' + anthropic_line("one")[1:], "['custmo_id']: no keys of this dialect"),
    "escape sequence in a key": (rb'{"\u001b]0;x\u0007":1,' + anthropic_line("one")[1:], "no keys of this dialect"),
    "escape sequence in a url": (rb'{"url":"\u001b]52;c;eA==\u0007","body":{}}', "url must be"),
    "escape sequence in a role": (
        rb'{"messages":[{"role":"\u009b2J\u202e","content":"x"}]}',
        "messages[0].role must be",
    ),
    "escape sequence in a provider": (rb'{"provider":"[/x]\u001b[2J","messages":[{}]}', "is not configured"),
    "escape sequence in a key twice": (rb'{"\u001bPq\u001b\\":1,"\u001bPq\u001b\\":2}', "is given twice in one object"),
    "separators in a model": (rb'{"model":["\u2028\r\n"],"messages":[{}]}', "model must be"),
    "a batch of embeddings": (b'{"custom_id":"x","url":"/v1/embeddings","body":{}}', "url must be"),
    "a batch to another host": (b'{"custom_id":"x","url":"http://169.254.169.254/","body":{}}', "url must be"),
}

# Fields with which a line would choose where keys and conversations go.
_ROUTES = ("base_url", "api_base", "url", "headers", "extra_headers", "api_key")
_PLACES = ("http://169.254.169.254/latest", "file:///etc/passwd", "gopher://example.com", "https://evil.example/v1")


def _native(name: str, more: bytes) -> bytes:
    return b'{"custom_id":%s,"model":"gpt-6-luna","messages":[{"role":"user","content":"x"}],%s}' % (
        _quoted(name),
        more,
    )


def _route_cases() -> list[Case]:
    """Return a line of each dialect with each of the fields, in its body and beside it."""
    writers: Mapping[str, Callable[[str, bytes], bytes]] = {
        "native": _native,
        "openai": lambda name, more: openai_line(name).replace(b'"value":1', more),
        "anthropic": lambda name, more: anthropic_line(name).replace(b'"value":1', more),
        "beside an openai body": lambda name, more: b"{%s,%s" % (more, openai_line(name)[1:].replace(b'"url"', b'"x"')),
        "beside an anthropic body": lambda name, more: b"{%s,%s" % (more, anthropic_line(name)[1:]),
    }
    cases = []
    for dialect, write in writers.items():
        for number, field in enumerate(_ROUTES):
            name = f"{field}, {dialect}"
            place = _PLACES[number % len(_PLACES)].encode()
            reason = "no keys of this dialect" if "beside" in dialect else f"a line cannot set {field}"
            cases.append(Case(id=name, data=write(name, b'"%s":"%s"' % (field.encode(), place)), reason=reason))
    return cases


LINES: tuple[Case, ...] = (
    *(Case(id=f"{name}, openai", data=openai_line(name + ", openai", value)) for name, value in _KEPT.items()),
    *(Case(id=f"{name}, anthropic", data=anthropic_line(name + ", anthropic", value)) for name, value in _KEPT.items()),
    *(Case(id=name, data=openai_line(name, value), reason=reason) for name, (value, reason) in _REFUSED.items()),
    *(Case(id=name, data=data, reason=reason) for name, (data, reason) in _WHOLE.items()),
    *_route_cases(),
    Case(id="CR before the end", data=openai_line("CR before the end") + b"\r"),
    Case(id="white space around", data=b" \t" + openai_line("white space around") + b"\t "),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """An id as JSON. `custom_id` is what the result is called, None where the line is refused for `reason`."""

    id: str
    written: bytes
    custom_id: str | None = None
    reason: str = ""


NAMES: tuple[Name, ...] = (
    Name(id="path", written=b'"../../escaped"', custom_id="../../escaped"),
    Name(id="absolute path", written=b'"/etc/escaped"', custom_id="/etc/escaped"),
    Name(id="drive and device", written=rb'"C:\\CON"', custom_id="C:\\CON"),
    Name(id="dots", written=b'".."', custom_id=".."),
    Name(id="__proto__", written=b'"__proto__"', custom_id="__proto__"),
    Name(id="formula", written=b'"=1+1"', custom_id="=1+1"),
    Name(id="markup", written=b'"[/x] <script>"', custom_id="[/x] <script>"),
    Name(id="option", written=b'"--fresh"', custom_id="--fresh"),
    Name(id="space", written=b'" "', custom_id=" "),
    Name(id="bidi", written='"a\u202eb"'.encode(), custom_id="a\u202eb"),
    Name(id="composed", written='"é"'.encode(), custom_id="é"),
    Name(id="decomposed", written='"e\u0301"'.encode(), custom_id="e\u0301"),
    Name(id="512 characters", written=b'"%s"' % (b"x" * 512), custom_id="x" * 512),
    Name(id="number", written=b"1", custom_id="1"),
    Name(id="the number as text", written=b'"1"', reason="'1' was used before"),
    Name(id="negative number", written=b"-1", custom_id="-1"),
    Name(id="2^70", written=b"1180591620717411303424", custom_id="1180591620717411303424"),
    Name(id="text with a point", written=b'"1.0"', custom_id="1.0"),
    Name(id="number with a point", written=b"1.0", reason="custom_id must be a string or an integer, not a number"),
    Name(id="true", written=b"true", reason="not a boolean"),
    Name(id="object", written=b"{}", reason="not an object"),
    Name(id="array", written=b'["a"]', reason="not an array"),
    Name(id="empty", written=b'""', reason="1 to 512 characters, not 0"),
    Name(id="513 characters", written=b'"%s"' % (b"y" * 513), reason="1 to 512 characters, not 513"),
    Name(id="10 kB", written=b'"%s"' % (b"z" * 10_000), reason="1 to 512 characters, not 10,000"),
    Name(id="NUL", written=rb'"a\u0000b"', reason="must not have control characters"),
    Name(id="line end", written=rb'"a\nb"', reason="must not have control characters"),
    Name(id="ESC", written=rb'"a\u001b[2J"', reason="must not have control characters"),
    Name(id="C1", written='"a\x9b2J"'.encode(), reason="must not have control characters"),
    Name(id="used before", written=b'"../../escaped"', reason="'../../escaped' was used before"),
)
