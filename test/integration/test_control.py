"""The control plane says no: every refusal has its own code and a text that helps."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

import pytest
from bittensor import http_auth

from mapreduce import __version__
from mapreduce.errors import (
    BadMessage,
    PortInUse,
    Refused,
    Unavailable,
    VersionMismatch,
)
from mapreduce.net.auth import new_session_key, sign_request
from mapreduce.net.client import call
from mapreduce.net.listener import listen
from mapreduce.net.server import VERSION_HEADER, make_app, start_server
from mapreduce.services import miner_job
from mapreduce.wire.messages import (
    MAX_MESSAGE_BYTES,
    JoinRequest,
    MinerStatus,
    encode_message,
)
from test.integration.fleet import Fleet, in_loop, new_hotkey, until


def join_request(**changes: Any) -> JoinRequest:
    fields: dict[str, Any] = {
        "rank": 0,
        "peer_count": 1,
        "bandwidth": 1 << 20,
        "miner_count": None,
        "session_key": new_session_key().ss58_address,
        "delegation": "0" * 128,
        "audit": True,
        "job": "",
        "timeout_s": 5.0,
    }
    return JoinRequest(**(fields | changes))


# Who asks -----------------------------------------------------------------------------------------


@in_loop
async def test_a_replayed_request_is_refused() -> None:
    async with Fleet(1) as fleet:
        remote, path = fleet.miners[0].remote, "/v1/status"
        headers = sign_request(
            fleet.validator_key, method="GET", path=path, body=b"", receiver=remote.hotkey
        )
        status, _ = await fleet.request(None, remote, "GET", path, headers=headers)
        assert status == 200
        status, code, text = await fleet.refusal(None, remote, "GET", path, headers=headers)
        assert (status, code) == (401, "replayed_request")
        assert "received before" in text


@in_loop
async def test_a_request_for_another_receiver_is_refused() -> None:
    async with Fleet(2) as fleet:
        first, second = fleet.miners
        headers = sign_request(
            fleet.validator_key,
            method="GET",
            path="/v1/status",
            body=b"",
            receiver=second.remote.hotkey,
        )
        status, code, text = await fleet.refusal(
            None, first.remote, "GET", "/v1/status", headers=headers
        )
        assert (status, code) == (401, "wrong_receiver")
        assert first.remote.hotkey in text


@pytest.mark.parametrize(
    ("age_s", "says"),
    [(14.0, "14.0 s behind this clock"), (-7.0, "ahead of this clock"), (-1e300, "ahead of")],
)
def test_a_clock_error_says_by_how_many_seconds(age_s: float, says: str) -> None:
    @in_loop
    async def run() -> None:
        async with Fleet(1) as fleet:
            remote = fleet.miners[0].remote
            headers = http_auth.sign(
                fleet.validator_key,
                method="GET",
                path="/v1/status",
                receiver_ss58=remote.hotkey,
                nonce_ns=time.time_ns() - int(age_s) * 10**9,
            )
            status, code, text = await fleet.refusal(
                None, remote, "GET", "/v1/status", headers=headers
            )
            assert (status, code) == (401, "stale_request")
            assert says in text
            assert "10 s behind and 2 s ahead are accepted" in text

    run()


@in_loop
async def test_an_oversized_body_is_refused_before_anything_is_verified() -> None:
    async with Fleet(1) as fleet:
        status, code, text = await fleet.refusal(
            None, fleet.miners[0].remote, "POST", "/v1/jobs", b"x" * (MAX_MESSAGE_BYTES + 1)
        )
        assert (status, code) == (413, "too_large")
        assert str(MAX_MESSAGE_BYTES) in text


@in_loop
async def test_headers_that_prove_nothing_are_refused() -> None:
    async with Fleet(1) as fleet:
        remote = fleet.miners[0].remote
        status, code, text = await fleet.refusal(None, remote, "GET", "/v1/status")
        assert (status, code) == (401, "malformed_auth")
        assert "X-Bittensor-Version" in text

        signed = sign_request(
            fleet.validator_key, method="GET", path="/v1/status", body=b"", receiver=remote.hotkey
        )
        forged = signed | {"X-Bittensor-Signature": "0x" + "11" * 64}
        status, code, text = await fleet.refusal(None, remote, "GET", "/v1/status", headers=forged)
        assert (status, code) == (401, "bad_signature")

        # Signed for another path, or with another body: the signature does not hold.
        status, code, _ = await fleet.refusal(None, remote, "GET", "/v1/status?a=1", headers=signed)
        assert (status, code) == (401, "bad_signature")


@in_loop
async def test_another_major_version_is_refused_with_both_names() -> None:
    async with Fleet(1) as fleet:
        remote = fleet.miners[0].remote
        for theirs in ("99.1.0", ""):
            status, code, text = await fleet.refusal(
                fleet.validator_key, remote, "GET", "/v1/status", version=theirs
            )
            assert (status, code) == (426, "version_mismatch")
            assert f"version {theirs or 'unknown'}" in text
            assert __version__ in text
        fleet.http.headers[VERSION_HEADER] = "99.1.0"
        with pytest.raises(VersionMismatch, match=r"miner uid 1 at 127.0.0.1") as caught:
            await call(
                fleet.http, fleet.validator_key, remote, "GET", "/v1/status", None, MinerStatus
            )
        assert caught.value.status == 426


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rank": -1}, "rank"),
        ({"rank": "1"}, "rank"),
        ({"peer_count": 257}, "peer_count"),
        ({"bandwidth": 0}, "bandwidth"),
        ({"session_key": "nobody"}, "session_key"),
        ({"job": "x" * 65}, "job"),
        ({"timeout_s": "soon"}, "timeout_s"),
        (None, "rank"),
    ],
)
def test_a_message_that_is_wrong_names_the_field(
    change: dict[str, object] | None, field: str
) -> None:
    @in_loop
    async def run() -> None:
        async with Fleet(0) as fleet:
            document = json.loads(encode_message(join_request()))
            if change is None:
                del document[field]
            body = json.dumps(document | (change or {})).encode()
            status, code, text = await fleet.refusal(
                fleet.peer_key, fleet.validator, "POST", "/v1/join", body
            )
            assert (status, code) == (400, "bad_message")
            assert f"JoinRequest: {field}: " in text

    run()


@in_loop
async def test_bytes_that_are_no_json_and_routes_that_are_none_get_json_errors() -> None:
    async with Fleet(0) as fleet:
        for body in (b"", b"{", b"\xff\xfe", b"[]", b"[" * 50_000):
            status, code, text = await fleet.refusal(
                fleet.peer_key, fleet.validator, "POST", "/v1/join", body
            )
            assert (status, code) == (400, "bad_message")
            assert text.startswith("JoinRequest: ")
        status, code, text = await fleet.refusal(
            fleet.peer_key, fleet.validator, "GET", "/v1/nothing"
        )
        assert (status, code) == (404, "http_error")
        assert text == "GET /v1/nothing: Not Found"
        status, code, _ = await fleet.refusal(fleet.peer_key, fleet.validator, "GET", "/v1/join")
        assert (status, code) == (405, "http_error")


@in_loop
async def test_session_keys_and_hotkeys_are_not_interchangeable() -> None:
    async with Fleet(1) as fleet:
        miner = fleet.miners[0]
        status, code, text = await fleet.refusal(
            new_session_key(), fleet.validator, "POST", "/v1/join", join_request()
        )
        assert (status, code) == (403, "not_a_hotkey")
        assert "hotkey" in text
        status, code, _ = await fleet.refusal(
            new_session_key(), miner.remote, "GET", "/v1/status", None
        )
        assert (status, code) == (403, "no_permit")
        job, keys = await fleet.offer()
        path = f"/v1/jobs/{job}/stream"
        for key in (fleet.validator_key, new_session_key()):
            status, code, text = await fleet.refusal(key, miner.remote, "GET", path)
            assert (status, code) == (403, "not_in_job")
        status, code, _ = await fleet.refusal(keys[0], miner.remote, "GET", path)
        assert (status, code) == (426, "not_an_upgrade")


# Offers -------------------------------------------------------------------------------------------


@in_loop
async def test_who_holds_no_permit_offers_nothing() -> None:
    async with Fleet(1) as fleet:
        miner, stranger = fleet.miners[0], new_hotkey()
        fleet.directory.add(stranger.ss58_address)  # registered, but no validator
        grant = fleet.grant([new_session_key()], [miner], validator=stranger.ss58_address)
        for method, path, message in (
            ("POST", "/v1/jobs", fleet.sign(grant, stranger)),
            ("GET", "/v1/status", None),
            ("DELETE", f"/v1/jobs/{grant.job}", None),
        ):
            status, code, text = await fleet.refusal(stranger, miner.remote, method, path, message)
            assert (status, code) == (403, "no_permit")
            assert stranger.ss58_address in text


@in_loop
async def test_a_miner_reads_the_grant_before_it_accepts() -> None:
    async with Fleet(2) as fleet:
        miner, other = fleet.miners
        rival = new_hotkey()
        fleet.directory.add(rival.ss58_address, permit=True)
        keys = [new_session_key()]
        good = fleet.grant(keys, [miner])
        tampered = replace(
            fleet.sign(good), grant=fleet.sign(replace(good, bandwidth=good.bandwidth + 1)).grant
        )
        key = fleet.validator_key
        for caller, signed, says in (
            (rival, fleet.sign(good), f"not {rival.ss58_address}'s"),
            (key, fleet.sign(good, rival), "signature of this grant is not"),
            (key, tampered, "signature of this grant is not"),
            (key, fleet.sign(fleet.grant(keys, [other])), "names this miner 0 times"),
            (key, fleet.sign(fleet.grant(keys, [miner, miner])), "names this miner 2 times"),
            (key, fleet.sign(replace(good, expires_at=time.time() - 1)), "has expired"),
            (key, fleet.sign(replace(good, window_bytes=1000)), "window_bytes"),
            (key, fleet.sign(replace(good, frame_bytes=1 << 30)), "frame_bytes"),
            (key, fleet.sign(replace(good, job="../etc")), "Grant: job: "),
        ):
            status, code, text = await fleet.refusal(
                caller, miner.remote, "POST", "/v1/jobs", signed
            )
            assert (status, code) == (400, "bad_message")
            assert says in text
        assert not miner.miner.jobs
        for expected in (200, 409):
            status, answer = await fleet.request(
                key, miner.remote, "POST", "/v1/jobs", fleet.sign(good)
            )
            assert status == expected
        assert answer["error"]["code"] == "duplicate_job"
        assert good.job in answer["error"]["message"]


@in_loop
async def test_a_miner_that_is_full_says_so_with_figures() -> None:
    async with Fleet(0) as fleet:
        busy = await fleet.add_miner(max_jobs=1)
        small = await fleet.add_miner(memory_limit_bytes=1 << 20)
        await fleet.offer()
        key, keys = fleet.validator_key, [new_session_key() for _ in range(8)]
        status, code, text = await fleet.refusal(
            key, busy.remote, "POST", "/v1/jobs", fleet.sign(fleet.grant(keys, [busy]))
        )
        assert (status, code) == (409, "too_many_jobs")
        assert "all 1 jobs" in text
        assert "--miner.max_jobs" in text
        status, code, text = await fleet.refusal(
            key, small.remote, "POST", "/v1/jobs", fleet.sign(fleet.grant(keys, [small]))
        )
        assert (status, code) == (409, "no_memory")
        assert "needs 2.25 MiB, 1.00 MiB are free" in text
        assert "--miner.memory_limit" in text
        with pytest.raises(Refused) as caught:
            await fleet.open_job(0, 1, miner_count=2)
        assert caught.value.code == "too_few_miners"
        assert f"uid {busy.uid}: all 1 jobs are taken" in str(caught.value)


@in_loop
async def test_only_the_validator_that_offered_releases() -> None:
    async with Fleet(1) as fleet:
        miner, rival = fleet.miners[0], new_hotkey()
        fleet.directory.add(rival.ss58_address, permit=True)
        job, _ = await fleet.offer()
        path = f"/v1/jobs/{job}"
        status, code, text = await fleet.refusal(rival, miner.remote, "DELETE", path)
        assert (status, code) == (403, "not_yours")
        assert "another validator's" in text
        status, _ = await fleet.request(fleet.validator_key, miner.remote, "DELETE", path)
        assert status == 200
        assert not miner.miner.jobs
        status, code, text = await fleet.refusal(fleet.validator_key, miner.remote, "DELETE", path)
        assert (status, code) == (404, "no_such_job")


@in_loop
async def test_a_reservation_that_nobody_uses_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miner_job, "UNUSED_RESERVATION_S", 0.1)
    monkeypatch.setattr(miner_job, "CHECK_S", 0.02)
    async with Fleet(1) as fleet:
        miner = fleet.miners[0].miner
        before = miner.memory_free_bytes
        job, keys = await fleet.offer(peer_count=2)
        await until(lambda: not miner.jobs, "the reservation expires")
        assert miner.memory_free_bytes >= before - (64 << 20)  # other processes use memory too
        status, code, _ = await fleet.refusal(
            keys[0], fleet.miners[0].remote, "GET", f"/v1/jobs/{job}/stream"
        )
        assert (status, code) == (404, "no_such_job")


# Plain HTTP ---------------------------------------------------------------------------------------


@in_loop
async def test_health_and_readiness_need_no_signature() -> None:
    async with Fleet(0) as fleet:
        for path, not_ready, expected in (
            ("/healthz", None, (200, {"status": "ok", "version": __version__})),
            ("/readyz", None, (200, {"status": "ready", "version": __version__})),
            ("/readyz", "starting", (503, {"status": "not ready", "reason": "starting"})),
            ("/healthz", "starting", (200, {"status": "ok", "version": __version__})),
        ):
            fleet.not_ready = not_ready
            assert await fleet.request(None, fleet.validator, "GET", path) == expected


@in_loop
async def test_a_port_in_use_is_named() -> None:
    async with Fleet(0) as fleet:
        port = fleet.validator.port
        with pytest.raises(PortInUse, match=f"127.0.0.1:{port}") as caught:
            await start_server(make_app(None, lambda: None), listen("127.0.0.1", port))  # type: ignore[arg-type]
        assert caught.value.port == port


@in_loop
async def test_the_client_names_whom_it_cannot_reach_or_understand() -> None:
    async with Fleet(0) as fleet:

        async def ask(remote: Any, **options: Any) -> None:
            await call(fleet.http, fleet.peer_key, remote, "GET", "/healthz", None, MinerStatus)

        with pytest.raises(BadMessage, match=r"validator uid 0 at .*: MinerStatus: jobs: "):
            await ask(fleet.validator)
        dead = replace(fleet.validator, port=1)
        with pytest.raises(Unavailable, match=r"validator uid 0 at 127.0.0.1:1 cannot be reached"):
            await ask(dead)

        async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(silence, "127.0.0.1", 0)
        async with server:
            mute = replace(fleet.validator, port=server.sockets[0].getsockname()[1])
            with pytest.raises(Unavailable, match=r"did not answer GET /healthz in 0.2 s"):
                await call(
                    fleet.http,
                    fleet.peer_key,
                    mute,
                    "GET",
                    "/healthz",
                    None,
                    MinerStatus,
                    timeout_s=0.2,
                )
