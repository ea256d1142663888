"""What the speed test's tool prints, what a miner tells of it, and when the next may start."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from mapreduce.errors import BadMessage
from mapreduce.services.speedtest import is_installed, tool_command
from mapreduce.speedtest import NOTICE, answer_lines
from mapreduce.wire.messages import decode_message, encode_message
from mapreduce.wire.speedtest import (
    EVERY_S,
    MAX_NAME,
    MAX_OUTPUT_BYTES,
    MAX_REASON,
    NEVER,
    RETRY_S,
    SpeedTestAnswer,
    SpeedTestServer,
    done,
    failed,
    loggable,
    may_start,
    running,
)

NOW = 1_790_000_000.0
PUBLIC: dict[str, Any] = {
    "download": 941200000.5,
    "upload": 471000000.25,
    "ping": 11.5,
    "server": {
        "url": "http://speedtest.example.net:8080/speedtest/upload.php",
        "lat": "52.5233",
        "lon": "13.4127",
        "name": "Berlin",
        "country": "Germany",
        "cc": "DE",
        "sponsor": "Example Net",
        "id": "1234",
        "host": "speedtest.example.net:8080",
        "d": 3.1,
        "latency": 11.5,
    },
    "timestamp": "2026-09-21T14:13:20.000000Z",
    "bytes_sent": 100000000,
    "bytes_received": 400000000,
    "share": None,
    "client": {"ip": "192.0.2.1", "lat": "52.5", "lon": "13.4", "isp": "An ISP", "country": "DE"},
}
MINI_SERVER = {
    "sponsor": "Speedtest Mini",
    "name": "127.0.0.1:8080",
    "d": 0,
    "url": "http://127.0.0.1:8080/mini/speedtest/upload.php",
    "latency": 0.2,
    "id": 0,
}


def output(**changes: Any) -> bytes:
    return json.dumps(PUBLIC | changes).encode()


def server(**changes: Any) -> bytes:
    return output(server=PUBLIC["server"] | changes)


# What the tool prints ---------------------------------------------------------------------------


def test_the_output_of_a_public_server_is_read() -> None:
    assert done(output(), NOW) == SpeedTestAnswer(
        state="done",
        at=NOW,
        next_at=NOW + EVERY_S,
        download_bits_per_s=941200000.5,
        upload_bits_per_s=471000000.25,
        ping_s=0.0115,
        server=SpeedTestServer(
            name="Berlin",
            sponsor="Example Net",
            country="Germany",
            host="speedtest.example.net:8080",
        ),
    )


def test_a_mini_server_has_no_more_than_a_name() -> None:
    answer = done(output(server=MINI_SERVER), NOW)
    assert answer.server == SpeedTestServer(
        name="127.0.0.1:8080", sponsor="Speedtest Mini", country="", host=""
    )


def test_what_is_nobodys_business_is_not_told() -> None:
    answer = done(output(server=MINI_SERVER | {"name": "user:secret@10.0.0.1:8080"}), NOW)
    told = encode_message(answer).decode()
    for private in ("secret", "192.0.2.1", "An ISP", "http"):
        assert private not in told


def test_a_server_that_leaves_a_ping_unanswered_has_none() -> None:
    for ping_ms in (600000.2, 1200000.1, 1800000.0):  # one, two and three of three
        assert done(output(ping=ping_ms), NOW).ping_s is None


@pytest.mark.parametrize("direction", ["download", "upload"])
def test_no_bytes_in_one_direction_are_no_measurement(direction: str) -> None:
    with pytest.raises(BadMessage, match="the server did not answer"):
        done(output(**{direction: 0.0}), NOW)


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        (b"", "speedtest-cli: ToolOutput: body"),
        (b"Cannot retrieve speedtest configuration\n", "body"),
        (b"[]", "body"),
        (b"\xff\xfe", "body"),
        (b"[" * 60000, "body"),
        (output()[:-1], "body"),
        (output(download=None), "download"),
        (output(download="941"), "download"),
        (output(upload=-1), "upload"),
        (output(upload=1e16), "upload"),
        (output(ping=float("nan")), "ping"),
        (output(ping=float("inf")), "ping"),
        (output(download=True), "download"),
        (output(server=None), "server"),
        (server(name=7), "server.name"),
        (json.dumps({"download": 1}).encode(), "upload"),
        (b" " * MAX_OUTPUT_BYTES + output(), f"more than {MAX_OUTPUT_BYTES} bytes"),
    ],
)
def test_an_output_that_cannot_be_used_says_why(printed: bytes, error: str) -> None:
    with pytest.raises(BadMessage, match=error.replace(".", r"\.")):
        done(printed, NOW)


def test_names_of_servers_are_cut_and_printable() -> None:
    answer = done(server(name="x" * 9999, sponsor="a\x1b[2Jb\nc"), NOW)
    assert answer.server is not None
    assert answer.server.name == "x" * MAX_NAME
    assert answer.server.sponsor == "a?[2Jb?c"


# What a miner tells -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [NEVER, running(NOW), done(output(), NOW), failed("refused", NOW)]
)
def test_an_answer_survives_the_wire(answer: SpeedTestAnswer) -> None:
    assert decode_message(SpeedTestAnswer, encode_message(answer)) == answer


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, "state"),
        ({"state": "great"}, "state"),
        ({"download_bits_per_s": float("inf")}, "download_bits_per_s"),
        ({"upload_bits_per_s": -1.0}, "upload_bits_per_s"),
        ({"ping_s": float("nan")}, "ping_s"),
        ({"at": -1.0}, "at"),
        ({"next_at": 1e300}, "next_at"),
        ({"reason": "x" * (MAX_REASON + 1)}, "reason"),
        ({"server": {"name": "x"}}, "server.sponsor"),
        (
            {"server": {"name": "x" * (MAX_NAME + 1), "sponsor": "", "country": "", "host": ""}},
            "server.name",
        ),
    ],
)
def test_a_miners_word_is_bounded(fields: dict[str, Any], error: str) -> None:
    told = json.dumps(({"state": "done"} if fields else {}) | fields)
    with pytest.raises(BadMessage, match=error.replace(".", r"\.")):
        decode_message(SpeedTestAnswer, told)


def test_a_reason_tells_no_address_and_no_path_and_the_log_no_password() -> None:
    reason = "ERROR: Failed to connect to\n http://user:secret@10.0.0.1/mini in ~/x /home/me/y"
    assert failed(reason, NOW).reason == "ERROR: Failed to connect to .. in .. .."
    assert loggable(reason) == (
        "ERROR: Failed to connect to http://..@10.0.0.1/mini in ~/x /home/me/y"
    )
    assert len(failed("x" * 9999, NOW).reason) == MAX_REASON


# When the next may start ------------------------------------------------------------------------


def test_one_test_in_six_hours_and_a_failed_one_again_after_ten_minutes() -> None:
    assert (EVERY_S, RETRY_S) == (21600.0, 600.0)
    assert may_start(NEVER, NOW)
    assert not may_start(running(NOW), NOW + 1e6)  # it ends when the tool does
    for last, wait_s in ((done(output(), NOW), EVERY_S), (failed("", NOW), RETRY_S)):
        assert last.next_at == NOW + wait_s
        assert [may_start(last, NOW + s) for s in (0.0, wait_s - 1, wait_s)] == [False, False, True]


def test_a_clock_that_was_set_back_blocks_nothing() -> None:
    assert may_start(done(output(), NOW), NOW - 1e6)


# How the tool is run ----------------------------------------------------------------------------


def test_a_validator_names_nothing_of_the_command() -> None:
    assert tool_command(None) == [
        *(sys.executable, "-P", "-W", "ignore", "-m", "speedtest"),
        *("--json", "--no-pre-allocate", "--secure"),
    ]
    assert tool_command("http://127.0.0.1/mini")[-2:] == ["--mini", "http://127.0.0.1/mini"]
    assert "--secure" not in tool_command("http://127.0.0.1/mini")


def test_the_tool_is_installed_with_the_project_and_a_missing_one_noticed() -> None:
    assert is_installed()
    assert not is_installed("speedtest_of_nobody")
    assert not is_installed("speedtest_of_nobody.tool")


# How it reads -----------------------------------------------------------------------------------


def test_people_read_the_figures_their_time_and_server_and_that_they_count_for_nothing() -> None:
    lines = answer_lines("miner uid 3", done(output(), NOW), NOW + 90)
    assert lines == [
        "miner      miner uid 3",
        "speed test done, begun 2026-09-21 14:13:20 UTC, 90 s ago",
        "download   941.2 Mbit/s",
        "upload     471.0 Mbit/s",
        "ping       11.5 ms",
        "server     Berlin, Example Net, Germany (speedtest.example.net:8080)",
        "next       from 2026-09-21 20:13:20 UTC",
        "",
        NOTICE,
    ]
    assert "no weight in any score" in NOTICE


def test_every_other_state_reads_too() -> None:
    assert answer_lines("m", NEVER, NOW)[1:] == [
        "speed test never: none since the miner was started"
    ]
    assert answer_lines("m", running(NOW), NOW + 7200)[1] == (
        "speed test running, begun 2026-09-21 14:13:20 UTC, 2 hours ago"
    )
    lines = answer_lines("m", failed("no route", NOW), NOW)
    assert lines[1].endswith("0 s ago: no route")
    assert lines[2] == "next       from 2026-09-21 14:23:20 UTC"


def test_a_miner_that_leaves_things_out_reads_too() -> None:
    bare = replace(SpeedTestAnswer(state="done"), at=NOW)
    assert answer_lines("m", bare, NOW)[2:6] == [
        *("download   -", "upload     -", "ping       -", "server     -"),
    ]
    assert answer_lines("m", SpeedTestAnswer(state="done", at=1e11), NOW)[1].endswith("0 s ago")
