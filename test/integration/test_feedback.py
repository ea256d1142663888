"""A miner asks its validator for its score, and anybody for a proof."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from mapreduce.chain import wallets
from mapreduce.config import PeerConfig
from mapreduce.core.scoring import Components, ScoringConfig
from mapreduce.errors import BadMessage, LocalError, Refused, ValidatorUnreachable
from mapreduce.local import NETUID as LOCAL_NETUID
from mapreduce.local import LocalSubnet
from mapreduce.local_chain import WALLETS
from mapreduce.net.auth import Verifier, new_session_key, signer
from mapreduce.net.client import Remote, call
from mapreduce.net.listener import listen
from mapreduce.net.server import make_app, start_server
from mapreduce.score import ask
from mapreduce.services import joining, miner_job
from mapreduce.services.feedback import MAX_AGE_S, Feedback, ask_proof, ask_score, read_score, told
from mapreduce.services.peer_audit import save_proof
from mapreduce.services.scorer import components_json
from mapreduce.store.history import Measurement, Score, Seen
from mapreduce.verify import main as verify
from mapreduce.wire.messages import decode_message
from mapreduce.wire.scores import ScoreFeedback, SignedScore, score_statement
from test.integration.fleet import (
    NETUID,
    Fleet,
    all_reduce,
    in_loop,
    integers,
    new_hotkey,
    until,
)
from test.integration.test_processes import eventually
from test.liars.miners import miner_session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from bittensor.sp_core import Keypair

    from mapreduce.chain.metagraph import Metagraph

CONFIG = ScoringConfig()
WINDOW_S = CONFIG.window_s
CAP_BYTES_PER_S = 90e6
WINDOW = 1000  # that was closed last
BEGIN = WINDOW * WINDOW_S
PARTS = Components(
    goodput_bytes_per_s=123_456_789.0,
    cap_bytes_per_s=90e6,
    phi=None,
    reliability=1.0,
    latency_s=0.5,
    latency_factor=1.0,
    gate=1.0,
    ramp=0.5,
    cluster_size=1,
    cluster_factor=1.0,
    score=45e6,
    weight=0.25,
    reasons=("measured in 6 of 12 windows",),
)


@asynccontextmanager
async def asked(fleet: Fleet) -> AsyncIterator[Remote]:
    """The routes over a fleet's state, on a port of their own."""
    feedback = Feedback(
        fleet.validator_key,
        NETUID,
        fleet.directory,  # type: ignore[arg-type]
        fleet.history,
        fleet.ledger,
        fleet.auditor,
        CAP_BYTES_PER_S,
        CONFIG,
    )
    hotkey = fleet.validator_key.ss58_address
    app = make_app(Verifier(hotkey), lambda: None)
    feedback.add_routes(app)
    runner = await start_server(app, listen("127.0.0.1", 0))
    try:
        yield Remote("validator uid 0", hotkey, "127.0.0.1", runner.addresses[0][1])
    finally:
        await runner.cleanup()


def register(fleet: Fleet) -> Keypair:
    key = new_hotkey()
    fleet.directory.add(key.ss58_address)
    fleet.history.see(
        [
            Seen(uid=n.uid, hotkey=n.hotkey, coldkey=n.coldkey, ip=n.ip)
            for n in fleet.directory.neurons
        ],
        time.time(),
    )
    return key


def close_window(fleet: Fleet, *keys: Keypair, window: int = WINDOW) -> None:
    """All of them have the same score, in this order."""
    score = Score(
        rank=0, score=PARTS.score, weight=PARTS.weight, components_json=components_json(PARTS)
    )
    ranked = {key.ss58_address: replace(score, rank=rank) for rank, key in enumerate(keys, 1)}
    fleet.history.close_window(window, time.time(), {}, ranked)


def measure(fleet: Fleet, key: Keypair, at: float, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "at": at,
        "window": int(at // WINDOW_S),
        "job": os.urandom(16).hex(),
        "hotkey": key.ss58_address,
        "outcome": "measured",
        "goodput_bytes_per_s": 123_456_789.0,
        "latency_s": 0.123456,
        "seconds": 10.0,
        "bytes": 10**9,
        "reason": "",
    }
    fleet.history.add_slot([Measurement(**(fields | changes))])


def add_proof(fleet: Fleet, culprit: str, proof: str, data: bytes, now: float) -> None:
    fleet.ledger.add_proof(
        proof,
        kind="F1 wrong sum",
        role="miner",
        culprit=culprit,
        job="1" * 32,
        step=1,
        segment=0,
        data=data,
        now=now,
    )


@in_loop
async def test_a_miner_is_told_its_own_score_and_nobody_elses() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        first, second = register(fleet), register(fleet)
        close_window(fleet, first, second)
        for rank, key in enumerate((first, second), 1):
            signed, score = await ask_score(fleet.http, key, validator)
            assert (score.hotkey, score.uid, score.status) == (key.ss58_address, rank, "scored")
            assert (score.validator, score.netuid) == (validator.hotkey, NETUID)
            assert score.score is not None
            assert (score.score.rank, score.score.miners) == (rank, 2)
            assert score.score.components == PARTS
            assert score.cap_bytes_per_s == CAP_BYTES_PER_S
            assert score.window == WINDOW
        assert first.ss58_address not in signed.score


@in_loop
async def test_whoever_has_no_score_is_told_why() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        stranger, newcomer = new_hotkey(), register(fleet)
        for _ in range(2):  # before the first window ends, and after
            _, score = await ask_score(fleet.http, stranger, validator)
            assert (score.status, score.uid, score.score) == ("not registered", None, None)
            _, score = await ask_score(fleet.http, newcomer, validator)
            assert (score.status, score.uid, score.score) == ("not scored yet", 1, None)
            assert (score.measurements, score.strikes, score.ban) == ([], [], None)
            close_window(fleet)


@in_loop
async def test_nothing_tells_which_job_of_the_running_window_was_a_benchmark() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        key = register(fleet)
        now = time.time()
        window = int(now // WINDOW_S)
        measure(fleet, key, (window - 1) * WINDOW_S + 1234.5)
        close_window(fleet, key, window=window - 1)
        _, before = await ask_score(fleet.http, key, validator)
        measure(fleet, key, now)
        measure(fleet, key, now, outcome="failed", goodput_bytes_per_s=0.0, reason="it stalled")
        signed, after = await ask_score(fleet.http, key, validator)
        assert replace(after, at=before.at) == before
        (row,) = after.measurements
        # Neither when it was nor its exact speed: a miner knows its jobs by both.
        assert (row.window_at, row.goodput_bytes_per_s) == ((window - 1) * WINDOW_S, 123e6)
        assert "job" not in signed.score
        close_window(fleet, key, window=window)
        _, closed = await ask_score(fleet.http, key, validator)
        assert [row.outcome for row in closed.measurements] == ["failed", "measured", "measured"]


@in_loop
async def test_the_last_measurements_are_bounded() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        key = register(fleet)
        now = time.time()
        for number in range(40):
            measure(fleet, key, now - 40 + number, window=WINDOW, reason=str(number) * 300)
        close_window(fleet, key)
        _, score = await ask_score(fleet.http, key, validator)
        numbers = [row.reason for row in score.measurements]
        assert numbers == [(str(number) * 300)[:256] for number in range(39, 7, -1)]


@in_loop
async def test_a_ban_and_disputes_are_told_at_once() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        key = register(fleet)
        hotkey = key.ss58_address
        close_window(fleet, key)
        at = time.time() - 60
        add_proof(fleet, hotkey, "a" * 32, b"evidence", at)
        for peer in ("one", "two", "two"):
            fleet.ledger.add_dispute(
                peer=peer,
                miner=hotkey,
                job=os.urandom(16).hex(),
                step=1,
                segment=0,
                what="-",
                now=at,
            )
        _, score = await ask_score(fleet.http, key, validator)
        assert score.status == "banned"
        assert score.ban is not None
        assert (score.ban.proof, score.ban.own) == ("a" * 32, True)
        assert score.ban.until == at + CONFIG.ban_s
        assert [(s.proof, s.kind, s.at) for s in score.strikes] == [("a" * 32, "F1 wrong sum", at)]
        assert score.disputes == 2


@in_loop
async def test_a_neighbour_of_a_liar_learns_that_it_is_not_the_liar() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        liar, neighbour = register(fleet), register(fleet)
        shared = [replace(n, coldkey="one owner") for n in fleet.directory.neurons]
        fleet.history.see(
            [Seen(uid=n.uid, hotkey=n.hotkey, coldkey=n.coldkey, ip=n.ip) for n in shared], 1.0
        )
        add_proof(fleet, liar.ss58_address, "a" * 32, b"evidence", time.time())
        _, score = await ask_score(fleet.http, neighbour, validator)
        assert score.ban is not None
        assert (score.status, score.ban.own, score.strikes) == ("banned", False, [])


@in_loop
async def test_the_weights_on_the_chain_are_told_and_why_the_last_attempt_failed() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        key = register(fleet)
        add = fleet.history.add_weights
        _, score = await ask_score(fleet.http, key, validator)
        assert (score.weights, score.weights_failed) == (None, None)
        add(at=1.0, block=7, vector_json='{"1":0.75,"2":0.25}', result="set", reason="")
        add(at=2.0, block=0, vector_json='{"1":1.0}', result="refused", reason="x" * 400)
        add(at=3.0, block=0, vector_json='{"1":1.0}', result="unreachable", reason="silent")
        _, score = await ask_score(fleet.http, key, validator)
        assert score.weights is not None
        assert score.weights_failed is not None
        assert (score.weights.block, score.weights.weight, score.weights.dry_run) == (
            7,
            0.75,
            False,
        )
        assert (score.weights_failed.at, score.weights_failed.reason) == (3.0, "silent")
        add(at=4.0, block=9, vector_json='{"2":1.0}', result="dry run", reason="")
        _, score = await ask_score(fleet.http, key, validator)
        assert score.weights is not None
        assert (score.weights.block, score.weights.weight, score.weights.dry_run) == (9, 0.0, True)


@in_loop
async def test_who_takes_over_a_uid_is_not_told_the_weight_of_the_one_before() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        key = register(fleet)
        fleet.directory.neurons[1] = replace(fleet.directory.neurons[1], registered_at_block=8)
        fleet.history.add_weights(at=1.0, block=7, vector_json='{"1":1.0}', result="set", reason="")
        _, score = await ask_score(fleet.http, key, validator)
        assert score.weights is not None
        assert score.weights.weight == 0.0


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (
            "lost: miner uid 3: the stream broke in step 17",
            "lost: miner uid 3: the stream broke in ..",
        ),
        (
            "wrong: step 2, segment 0: job 0123456789abcdef0123456789abcdef",
            "wrong: .., segment 0: job ..",
        ),
        ("the proof is in /tmp/mapreduce-bot-x/a.proof, as text", "the proof is in .. as text"),
        ("no answer from wss://node.example/KEY: refused", "no answer from .. refused"),
        ("did not take the job: full", "did not take the job: full"),
    ],
)
def test_a_reason_names_no_step_no_job_no_path_and_no_node(reason: str, expected: str) -> None:
    assert told(reason) == expected


@in_loop
async def test_why_bots_failed_is_not_told() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        key = register(fleet)
        measure(fleet, key, time.time(), window=WINDOW, outcome="void", reason="bot at 10.0.0.1")
        close_window(fleet, key)
        _, score = await ask_score(fleet.http, key, validator)
        assert [(row.outcome, row.reason) for row in score.measurements] == [("void", "")]


# Proofs -----------------------------------------------------------------------------------------


@pytest.mark.slow
@in_loop
async def test_the_proof_of_a_real_lie_is_fetched_by_anybody_and_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(miner_job, "MinerSession", miner_session("one_ulp"))
    async with Fleet(1, audit_budget=1.0) as fleet, asked(fleet) as validator:
        jobs = await fleet.open_jobs(2, proof_directory=tmp_path / "peers")
        await asyncio.gather(*(all_reduce(job, integers(job.rank, 70_000)) for job in jobs))
        await until(fleet.ledger.proofs, "the proof")
        _, score = await ask_score(fleet.http, fleet.miners[0].key, validator)
        (strike,) = score.strikes
        assert (score.status, strike.role) == ("banned", "miner")
        for key in (fleet.miners[0].key, new_hotkey()):
            data = await ask_proof(fleet.http, key, validator, strike.proof)
            assert data is not None
            path = save_proof(tmp_path / "own", data)
            assert path.name == f"{strike.proof}.proof"
            assert verify([str(path)]) == 0


@in_loop
async def test_evidence_that_is_gone_is_none_and_that_of_another_proof_is_refused() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        key = register(fleet)
        assert await ask_proof(fleet.http, key, validator, "b" * 32) is None
        add_proof(fleet, key.ss58_address, "a" * 32, b"another", time.time())
        with pytest.raises(BadMessage, match="another's"):
            await ask_proof(fleet.http, key, validator, "a" * 32)


@in_loop
async def test_the_command_saves_the_proofs_against_the_wallets_hotkey(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        key = register(fleet)
        fleet.directory.neurons[0] = replace(
            fleet.directory.neurons[0], ip=validator.ip, port=validator.port
        )
        kept, gone = blake3(b"evidence").hexdigest()[:32], "b" * 32
        add_proof(fleet, key.ss58_address, gone, b"", time.time() - 2)
        add_proof(fleet, key.ss58_address, kept, b"evidence", time.time() - 1)

        @asynccontextmanager
        async def no_chain(*_: object) -> AsyncIterator[None]:
            yield

        async def metagraph(*_: object) -> Metagraph:
            return await fleet.directory.metagraph()

        monkeypatch.setattr(joining, "connected", no_chain)
        monkeypatch.setattr(joining, "fetch_metagraph", metagraph)
        wallet = SimpleNamespace(hotkey=key)
        monkeypatch.setattr(wallets, "load_wallet", lambda *_: wallet)
        _, score, saved = await ask(PeerConfig(), None)
        assert ([strike.proof for strike in score.strikes], saved) == ([kept, gone], {})
        _, _, saved = await ask(PeerConfig(), tmp_path)
        path = tmp_path / f"{kept}.proof"
        assert saved == {kept: path, gone: None}
        assert path.read_bytes() == b"evidence"
        with pytest.raises(LocalError, match="cannot save a proof"):
            await ask(PeerConfig(), path)
        with pytest.raises(ValidatorUnreachable, match="has not served an axon"):
            await ask(PeerConfig(validator_uid=1), None)


# Whom not to believe ----------------------------------------------------------------------------


@in_loop
async def test_a_session_key_has_no_score() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        with pytest.raises(Refused, match="hotkey") as refused:
            await ask_score(fleet.http, new_session_key(), validator)
        assert (refused.value.code, refused.value.status) == ("hotkey_required", 403)


@in_loop
async def test_a_score_that_is_not_the_validators_fresh_word_on_this_hotkey_is_refused() -> None:
    async with Fleet(0) as fleet, asked(fleet) as validator:
        key = register(fleet)
        signed = await call(fleet.http, key, validator, "GET", "/v1/score", None, SignedScore)
        at = decode_message(ScoreFeedback, signed.score).at
        own = {"validator": validator.hotkey, "hotkey": key.ss58_address}
        assert read_score(signed, **own, now=at + MAX_AGE_S).uid == 1

        forged = replace(signed, score=signed.score.replace('"uid":1', '"uid":2'))
        stranger = new_hotkey()
        theirs = signer(stranger)(score_statement(signed.score)).hex()
        for wrong, text in (
            (forged, "signature"),
            (replace(signed, signature=theirs), "signature"),
        ):
            with pytest.raises(BadMessage, match=text):
                read_score(wrong, **own, now=at)
        by_stranger = own | {"validator": stranger.ss58_address}
        with pytest.raises(BadMessage, match=f"by {validator.hotkey}"):
            read_score(replace(signed, signature=theirs), **by_stranger, now=at)
        with pytest.raises(BadMessage, match=f"of {key.ss58_address}, not of"):
            read_score(signed, **(own | {"hotkey": stranger.ss58_address}), now=at)
        for now in (at + MAX_AGE_S + 1, at - MAX_AGE_S):
            with pytest.raises(BadMessage, match="by this clock"):
                read_score(signed, **own, now=now)


@in_loop
async def test_what_is_no_validator_is_named() -> None:
    async with Fleet(1) as fleet:
        key = new_hotkey()
        with pytest.raises(Refused, match=r"miner uid 1 at .* no validator that tells scores"):
            await ask_score(fleet.http, key, fleet.miners[0].remote)
        nobody = replace(fleet.miners[0].remote, port=1)
        with pytest.raises(ValidatorUnreachable, match="cannot be reached"):
            await ask_score(fleet.http, key, nobody)


# With real processes ----------------------------------------------------------------------------


def run_cli(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mapreduce.score", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_a_miner_and_its_validators_operator_read_the_same_score(tmp_path: Path) -> None:
    flags = ("--scoring.window_s", "4", "--benchmark.seconds", "0.3")
    with LocalSubnet(1, bots=1, validator_flags=(*flags, "--max_bandwidth", "80000000")) as s:
        chain = ("--subtensor.network", s.network, "--netuid", str(LOCAL_NETUID))
        keys = ("--wallet.path", str(s.directory / WALLETS))
        miner = (*chain, *keys, "--wallet.name", "miner-1", "--wallet.hotkey", "miner-1")
        uid = ("--validator.uid", str(s.validator_uid))
        answers: list[dict[str, Any]] = []

        def scored() -> bool:
            done = run_cli(*miner, *uid, "--json", "--proofs", str(tmp_path))
            assert done.returncode == 0, done.stderr
            answers.append(json.loads(done.stdout))
            score = answers[-1]["score"]["score"]
            return bool(score and score["components"]["weight"] > 0)

        assert eventually(scored, 40.0)
        answer = answers[-1]
        assert json.loads(answer["signed"]["score"])["hotkey"] == answer["score"]["hotkey"]
        assert answer["score"]["score"]["components"]["weight"] == 1.0
        assert answer["score"]["measurements"]
        assert answer["proofs"] == {}
        text = run_cli(*miner, *uid)
        assert "rank 1 of " in text.stdout
        board = run_cli("--state", str(s.state_path))
        assert board.stdout.splitlines()[1].split()[:2] == ["1", str(s.miner_uids[0])]

        for number, error in (
            (s.miner_uids[0], "no validator that tells scores"),
            (250, "validator uid 250 of netuid"),
        ):
            done = run_cli(*miner, "--validator.uid", str(number))
            assert (done.returncode, done.stdout) == (1, "")
            assert error in done.stderr
        no_wallet = run_cli(*chain, *keys, "--wallet.name", "nobody")
        assert (no_wallet.returncode, no_wallet.stdout) == (2, "")
