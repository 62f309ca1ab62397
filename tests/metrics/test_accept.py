"""Which form of /metrics an Accept header gets: RFC 9110, and what real clients send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clevrd.handlers.operate.accept import MAX_RANGES, Form, media_ranges, wanted_form

JSON, OPENMETRICS, TEXT = Form.JSON, Form.OPENMETRICS, Form.TEXT

CLIENTS = {
    # Nothing at all, and curl.
    "": JSON,
    "*/*": JSON,
    "application/json": JSON,
    # Chrome, Firefox, axios, jQuery for JSON.
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;"
    "q=0.8,application/signed-exchange;v=b3;q=0.7": JSON,
    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": JSON,
    "application/json, text/plain, */*": JSON,
    "application/json, text/javascript, */*; q=0.01": JSON,
    # Prometheus 2.0, 2.5, 2.42 (without and with native histograms), 3.0.
    "text/plain;version=0.0.4;q=1,*/*;q=0.1": TEXT,
    "application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1": (
        OPENMETRICS
    ),
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1": OPENMETRICS,
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited,"
    "application/openmetrics-text;version=1.0.0;q=0.8,application/openmetrics-text;version=0.0.1;"
    "q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1": OPENMETRICS,
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/"
    "openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1": OPENMETRICS,
    # Prometheus 3.0 that is told to take nothing else.
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.6,*/*;q=0.5": TEXT,
    # Telegraf, and vmagent.
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;"
    "q=0.7,text/plain;version=0.0.4;q=0.3,*/*;q=0.1": TEXT,
    "text/plain;version=0.0.4;q=1,*/*;q=0.05": TEXT,
}


@pytest.mark.parametrize(("accept", "form"), CLIENTS.items())
def test_real_clients_get_what_they_read(accept: str, form: Form) -> None:
    """JSON for people and programs, Prometheus's forms for those that read them."""
    assert wanted_form(accept) is form


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("text/plain", TEXT),
        ("TEXT/PLAIN ; Version=0.0.4", TEXT),
        ("application/openmetrics-text", OPENMETRICS),
        ("text/*", TEXT),
        ("application/*", JSON),
        # The quality decides, in any order.
        ("text/plain;q=0.9, application/openmetrics-text;q=0.8", TEXT),
        ("text/plain;q=0.8, application/openmetrics-text;q=0.9", OPENMETRICS),
        ("application/json;q=0.1, text/plain;q=0.2", TEXT),
        # The closest range decides about a form, whatever others say.
        ("*/*, application/json;q=0.1, application/openmetrics-text;q=0", TEXT),
        ("text/plain;q=0, text/*", JSON),
        ("*/*;q=0, text/plain;version=0.0.4;q=0.001", TEXT),
        # What is named wins over what is anything, where both are liked alike.
        ("text/plain, */*", TEXT),
        # q=0 excludes; and where nothing is left, JSON is better than nothing.
        ("application/json;q=0", JSON),
        ("*/*;q=0", JSON),
        ("text/plain;q=0.000", JSON),
        ("image/png", JSON),
        # Versions that we don't speak.
        ("text/plain;version=2.0.0", JSON),
        ("application/openmetrics-text;version=2.0.0, text/plain;q=0.1", TEXT),
        ("application/json;version=1", JSON),
        # Quoted, also with what separates elsewhere.
        ('text/plain;version="0.0.4"', TEXT),
        ('text/plain;x="a,b;q=0";q=0.5', TEXT),
        (r'text/plain;version="0.\0.4"', TEXT),
        # Empty elements and parameters are nothing (RFC 9110 §5.6.1, §5.6.6).
        (", ,text/plain,", TEXT),
        ("text/plain;;q=1;", TEXT),
    ],
)
def test_negotiation_follows_rfc_9110(accept: str, form: Form) -> None:
    """§12.5.1: qualities, and the most specific range."""
    assert wanted_form(accept) is form


@pytest.mark.parametrize(
    "accept",
    [
        "text",
        "text/",
        "/plain",
        "text/plain;q=2",
        "text/plain;q=-1",
        "text/plain;q=0.1234",
        "text/plain;q=1.1",
        "text/plain;q=",
        "text/plain;q=nan",
        "text/plain;=0.0.4",
        "text/plain; version = 0.0.4",
        'text/plain;version="0.0.4',
        "text/plain version=0.0.4",
        "text /plain",
        "text/plain/x",
        "text/plain;q=1\x00",
        "tëxt/plain",
    ],
)
def test_malformed_ranges_are_passed_over(accept: str) -> None:
    """They name nothing; what stands beside them counts."""
    assert wanted_form(accept) is JSON
    assert wanted_form(f"{accept}, application/openmetrics-text;q=0.5") is (
        # An open quote takes the rest of the header with it.
        JSON if accept.count('"') == 1 else OPENMETRICS
    )


def test_a_header_of_nothing_but_ranges_is_not_read_to_its_end() -> None:
    """8 KB of them would take 10 ms."""
    accept = ",".join(["a/b"] * 2_000) + ",text/plain"

    assert len(list(media_ranges(accept))) == MAX_RANGES
    assert wanted_form(accept) is JSON


@given(st.text(st.sampled_from('atxplin/*;,=q01."\\ \t\0é'), max_size=80))
def test_any_header_gets_a_form(accept: str) -> None:
    """Nothing that a stranger sends raises."""
    assert wanted_form(accept) in Form


@given(st.permutations(["text/plain;q=0.2", "application/json;q=0.3", "*/*;q=0.1", "a/b"]))
def test_order_does_not_matter(ranges: list[str]) -> None:
    """Ranges are a set with qualities."""
    assert wanted_form(",".join(ranges)) is JSON
