"""Records: a message as a line, however its publisher spelled it."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import pytest

from clevrd.core.publish_request import PublishRequest, decode_publish
from clevrd.journal.records import (
    Clear,
    Header,
    decode_header,
    encode_record,
    line_of,
    lines_of,
    partition_of,
    plain_data,
)

DATA = [
    b"1",
    b'"a\\nb"',
    b'{"a":[1,\n  2]}',
    b'{"a":\r\n1}',
    b'"\xc3\xa9 \xe2\x80\xa8"',
    b'{"topic":"no","data":}'.replace(b":}", b":0}"),
]


@pytest.mark.parametrize("topic", ["t", 'a"b', "é.ü"], ids=["plain", "quote", "letters"])
def test_lines_of_a_run_are_those_of_each_message(topic: str) -> None:
    """One line each, which is a publish object again: pretty-printed JSON and keys too."""
    requests = [PublishRequest(topic, msgspec.Raw(data)) for data in DATA]
    requests.append(PublishRequest(topic, msgspec.Raw(b"2"), None, "key"))
    requests.append(PublishRequest(topic, msgspec.Raw(b"3"), "once"))
    plain = requests[:2]

    lines = [lines_of(requests, None), lines_of(plain, None)]

    for found, given in zip(lines, (requests, plain), strict=True):
        assert found == b"".join([line_of(request) for request in given])
        assert found.count(b"\n") == len(given)
        assert b"\r" not in found


@pytest.mark.parametrize("index", range(len(DATA)))
def test_lines_of_a_message_are_its_line(index: int) -> None:
    """One alone, with and without the key of its header field."""
    request = PublishRequest("t", msgspec.Raw(DATA[index]))

    assert lines_of([request], None) == line_of(request)
    assert lines_of([request], "once") == line_of(request, "once")


@pytest.mark.parametrize("topic", ["t", 'a "b" \\ \u00fc', '","data":'])
def test_data_of_plain_lines_are_what_was_published(topic: str) -> None:
    """Without a parser: whatever the data are, and whatever they look like."""
    data = [
        *(
            b"1",
            b'""',
            b"[]",
            b'{"a":{"b":"}"}}',
            b'"}"',
            b'"{\\"topic\\":"',
            b'"\\u0022key\\u0022:"',
        ),
        b'{"topic":"%b","data":1}' % topic.encode() if topic == "t" else b"2.50",
    ]
    requests = [PublishRequest(topic, msgspec.Raw(each)) for each in data]

    assert plain_data(lines_of(requests, None), len(data), topic) == data


@pytest.mark.parametrize(
    "more",
    [
        {"key": "k"},
        {"idempotency_key": "i"},
        {"ttl_s": 1.5},
        {"data": msgspec.Raw(b'{"key":1}')},
        {"data": msgspec.Raw(b'{"ttl_s":1}')},
        {"topic": "u"},
    ],
)
def test_lines_that_may_say_more_are_for_a_parser(more: dict[str, Any]) -> None:
    """One such line among others is enough."""
    plain = PublishRequest("t", msgspec.Raw(b"1"))
    lines = b"".join(map(line_of, (plain, msgspec.structs.replace(plain, **more), plain)))

    assert plain_data(lines, 3, "t") == []
    assert plain_data(line_of(plain), 2, "t") == []
    assert plain_data(line_of(plain).rstrip(b"\n"), 1, "t") == []


def test_every_field_of_a_line_is_looked_for() -> None:
    """A field that is added to lines must not be taken for a part of the data."""
    request = PublishRequest("t", msgspec.Raw(b"1"), "i", "k", 1.5)
    line = line_of(request)

    for name in msgspec.json.decode(line):
        alone = b'{"topic":"t","data":1,"%b":1}\n' % name.encode()
        assert plain_data(alone, 1, "t") == (
            [] if name not in ("topic", "data") else [alone[20:-2]]
        )


def test_line_is_read_back_as_it_was_published() -> None:
    """Data, key and idempotency key; white space between tokens alone may differ."""
    request = PublishRequest("t", msgspec.Raw(b'{"a":\n[1, 2]}'), "once", "key")

    again = decode_publish(line_of(request))

    assert (again.topic, again.key, again.idempotency_key) == ("t", "key", "once")
    assert msgspec.json.decode(again.data) == {"a": [1, 2]}


def test_line_has_the_headers_of_its_message() -> None:
    """One by one and in a run; a reader that knows nothing of headers has the message."""
    headers = {"ce-id": "1", "ce-subject": "a\u2028b"}
    request = PublishRequest("t", msgspec.Raw(b"1"), headers=headers)
    none = PublishRequest("t", msgspec.Raw(b"2"), headers={})

    lines = lines_of([request, none], None)

    assert lines == line_of(request) + line_of(none)
    first, second, _ = lines.split(b"\n")
    assert decode_publish(first) == request
    assert second == b'{"topic":"t","data":2}'
    assert msgspec.json.decode(first) == {"topic": "t", "data": 1, "headers": headers}


def test_header_of_another_version_is_read_as_far_as_it_is_known() -> None:
    """A field that a later clevrd adds at the end is passed over; one that is missing is empty."""
    clears = (Clear("acme", "t"),)
    header = Header("ab", "cd", 1, 0, version="1.2.3", clears=clears)
    fields = msgspec.json.decode(msgspec.json.encode(header))

    later = encode_record(header, ()).replace(b',[["acme","t"]]]', b',[["acme","t"]],["new"]]')
    older = encode_record(header, ()).replace(b',"1.2.3",[["acme","t"]]]', b"]")

    assert len(fields) == len(Header.__struct_fields__)
    assert decode_header(_with_checksum(later))[0] == header
    assert decode_header(_with_checksum(older))[0] == Header("ab", "cd", 1, 0)


def _with_checksum(record: bytes) -> bytes:
    """Return a record whose header was changed by hand."""
    magic, _, rest = record.partition(b" ")
    return b"%b %08x%b" % (magic, zlib.crc32(rest[8:]), rest[8:])


def test_topic_has_its_partition_for_good() -> None:
    """Another number would give a topic of a log that is there a second partition."""
    names = [("acme", "a"), ("acme", "b"), ("acme", "c"), ("default-tenant", "a")]

    assert [partition_of(*each, 8) for each in names] == [2, 0, 6, 1]
    assert partition_of("acme", "\u00e9", 8) in range(8)
