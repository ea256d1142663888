"""`python -m mapreduce.score`: what a validator thinks of a miner, or of all miners, and why.

Knows how scores read, and whom to ask. How a score is made is in `core/scoring.py`; what a
validator tells is in `wire/scores.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapreduce.config import peer_config, run_cli
from mapreduce.errors import LocalError
from mapreduce.wire.scores import ScoreFeedback, SignedScore, read_components

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mapreduce.config import PeerConfig
    from mapreduce.core.scoring import Components
    from mapreduce.store.records import Leader

DESCRIPTION = """\
Ask a validator for the score of your hotkey, and why it is what it is; or, with --state, show all
scores in a validator's own state file, also while it runs.
"""


# For people -----------------------------------------------------------------------------------


def score_lines(feedback: ScoreFeedback) -> list[str]:
    """All that a validator tells of one hotkey."""
    now = feedback.at
    uid = "no uid" if feedback.uid is None else f"uid {feedback.uid}"
    lines = [
        f"validator  {feedback.validator} of netuid {feedback.netuid}",
        f"hotkey     {feedback.hotkey}, {uid}",
        f"status     {_status(feedback)}",
    ]
    if feedback.score is not None:
        components = feedback.score.components
        lines += [
            f"score      {components.score / 1e6:.3f} MB/s, rank {feedback.score.rank} of "
            f"{feedback.score.miners} in window {feedback.window}",
            f"weight     {components.weight:.4f} of all scores",
            "",
            *component_lines(components, feedback.cap_bytes_per_s),
        ]
    lines += ["", *_chain_lines(feedback)]
    if feedback.measurements:
        lines += ["", "last measurements (windows that are over; Mbit/s each way)"]
    lines += [
        f"  window {row.window}, from {_utc(row.window_at)}: "
        + (
            f"{_mbit_per_s(row.goodput_bytes_per_s)} Mbit/s"
            if row.outcome == "measured"
            else {"failed": "failed", "void": "shows nothing"}[row.outcome]
        )
        + ("" if row.latency_s is None else f", first byte after {row.latency_s * 1e3:.0f} ms")
        + (f": {row.reason}" if row.reason else "")
        for row in feedback.measurements
    ]
    if feedback.strikes:
        lines += ["", "strikes (proofs of lies)"]
    lines += [
        f"  {strike.proof}  {strike.kind}, as {strike.role}, {_ago(now - strike.at)}"
        for strike in feedback.strikes
    ]
    if feedback.disputes:
        lines += ["", f"disputes   {feedback.disputes} peers in the last day; proves nothing"]
    return lines


def component_lines(parts: Components, cap_bytes_per_s: float) -> list[str]:
    """Every factor of a score with its meaning, and what lowers it in words."""
    latency = "-" if parts.latency_s is None else f"{parts.latency_s * 1e3:.0f} ms"
    phi = "-" if parts.phi is None else f"{parts.phi:.2f}"
    rows = (
        ("measured", f"{_mbit_per_s(parts.goodput_bytes_per_s)} Mbit/s", "each way, by bots"),
        (
            "paid for",
            f"{_mbit_per_s(parts.cap_bytes_per_s)} Mbit/s",
            f"the same after real jobs, at most the {_mbit_per_s(cap_bytes_per_s)} Mbit/s that "
            "bots can measure",
        ),
        ("real jobs", phi, "their speed over that of the bots' jobs; -: too few"),
        ("reliability", f"{parts.reliability:.3f}", "share of its jobs that went well"),
        ("latency", latency, "to the first reduced byte"),
        ("  factor", f"{parts.latency_factor:.3f}", "less than 1 above the middle miner's latency"),
        ("gate", f"{parts.gate:.2f}", "0: banned; below 1: disputed, or samples not shown"),
        ("ramp", f"{parts.ramp:.2f}", "rises to 1 with the windows that measured it"),
        ("cluster", str(parts.cluster_size), "miners that share a network or an owner"),
        ("  factor", f"{parts.cluster_factor:.2f}", "less for each further one of them"),
    )
    lines = [f"  {name:<11}  {value:>14}  {meaning}" for name, value, meaning in rows]
    return lines + [f"  lowered: {reason}" for reason in parts.reasons]


def leaderboard_lines(leaders: Sequence[Leader], now: float) -> list[str]:
    """One line per miner, best first."""
    lines = [
        f"{'rank':>4}  {'uid':>5}  {'hotkey':<13}  {'Mbit/s':>9}  {'reliability':>11}  "
        f"{'gate':>4}  {'ramp':>4}  {'score MB/s':>10}  {'weight':>6}  {'measured':>14}  "
        f"{'strikes':>7}  reasons"
    ]
    for leader in leaders:
        parts = _components(leader)
        uid = "-" if leader.uid is None else str(leader.uid)
        measured = "never" if leader.measured_at is None else _ago(now - leader.measured_at)
        lines.append(
            f"{leader.rank:>4}  {uid:>5}  {_short(leader.hotkey)}  "
            f"{_mbit_per_s(parts.goodput_bytes_per_s):>9}  {parts.reliability:>11.3f}  "
            f"{parts.gate:>4.2f}  {parts.ramp:>4.2f}  {leader.score / 1e6:>10.3f}  "
            f"{leader.weight:>6.4f}  {measured:>14}  {len(leader.strikes):>7}  "
            f"{'; '.join(parts.reasons)}".rstrip()
        )
    return lines


def _status(feedback: ScoreFeedback) -> str:
    text: str = feedback.status
    if feedback.status == "not registered":
        text = f"not registered on netuid {feedback.netuid}: nothing can be paid"
    elif feedback.status == "not scored yet":
        text = "not scored yet: the first window with this hotkey is still to end"
    if feedback.ban is not None:
        whom = "it" if feedback.ban.own else "another hotkey of its coldkey or address"
        text += (
            f"{'' if feedback.status == 'banned' else '; banned'} until {_utc(feedback.ban.until)} "
            f"for proof {feedback.ban.proof} against {whom}"
        )
    if feedback.window_closed_at is not None:
        text += f"; the last window closed {_ago(feedback.at - feedback.window_closed_at)}"
    return text


def _chain_lines(feedback: ScoreFeedback) -> list[str]:
    last, failed = feedback.weights, feedback.weights_failed
    line = "chain      this validator has set no weights yet"
    if last is not None:
        how = "would have set (dry run)" if last.dry_run else "has set"
        line = (
            f"chain      this validator {how} a weight of {last.weight:.4f} at block {last.block}, "
            f"{_ago(feedback.at - last.at)}"
        )
    if failed is None:
        return [line]
    return [line, f"           last failure {_ago(feedback.at - failed.at)}: {failed.reason}"]


def _mbit_per_s(bytes_per_s: float) -> str:
    """Each way: a goodput counts what goes in and what comes out."""
    return f"{bytes_per_s * 8e-6 / 2:.1f}"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _utc(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):  # the validator may have written any number
        return f"{seconds} s of the Unix epoch"


def _short(hotkey: str) -> str:
    return f"{hotkey[:6]}..{hotkey[-5:]}"


def _components(leader: Leader) -> Components:
    return read_components(leader.components_json, score=leader.score, weight=leader.weight)


def _print(lines: Sequence[str]) -> None:
    # What a stranger wrote must not drive the terminal.
    print("\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines))


# Where from -----------------------------------------------------------------------------------


async def ask(
    config: PeerConfig, directory: Path | None
) -> tuple[SignedScore, ScoreFeedback, dict[str, Path | None]]:
    """The score of the wallet's hotkey; with a directory, its proofs as well, and where each was
    saved: None for one whose evidence the validator has no more."""
    # Imported late: --help and --state need no bittensor.
    from mapreduce.chain.wallets import load_wallet
    from mapreduce.net.client import make_http_session
    from mapreduce.services.feedback import ask_proof, ask_score
    from mapreduce.services.joining import find_validator
    from mapreduce.services.peer_audit import save_proof

    key = load_wallet(config.wallet.name, config.wallet.hotkey, config.wallet.path).hotkey
    chain = config.chain
    validator = await find_validator(
        chain.network, chain.netuid, config.validator_uid, endpoint=chain.endpoint
    )
    saved: dict[str, Path | None] = {}
    async with make_http_session() as http:
        signed, score = await ask_score(http, key, validator)
        if directory is not None:
            for strike in score.strikes:
                data = await ask_proof(http, key, validator, strike.proof)
                try:
                    saved[strike.proof] = None if data is None else save_proof(directory, data)
                except OSError as error:
                    raise LocalError(f"cannot save a proof in {directory}: {error}") from None
    return signed, score, saved


def read_leaderboard(state: Path) -> list[Leader]:
    """The scores in a validator's state file. Raises LocalError if it cannot be read."""
    from mapreduce.store.database import Database
    from mapreduce.store.history import History

    with Database.open_read_only(state) as database:
        return History(database).leaderboard()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mapreduce.score", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--proofs", metavar="DIR", help="save the proofs against the hotkey, for mapreduce.verify"
    )
    parser.add_argument(
        "--state", metavar="FILE", help="show all scores in this state file of a validator"
    )
    config = peer_config(argv, parser=parser)
    for warning in config.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    options = config.args
    if options.state is not None:
        leaders = read_leaderboard(Path(options.state).expanduser())
        if options.json:
            print(json.dumps([_leader_fields(leader) for leader in leaders], indent=2))
        else:
            _print(leaderboard_lines(leaders, time.time()) if leaders else ["no scores yet"])
        return 0
    directory = None if options.proofs is None else Path(options.proofs).expanduser()
    signed, score, saved = asyncio.run(ask(config, directory))
    if options.json:
        proofs = {proof: None if path is None else str(path) for proof, path in saved.items()}
        fields = {"signed": asdict(signed), "score": asdict(score), "proofs": proofs}
        print(json.dumps(fields, indent=2))
        return 0
    evidence = [
        f"  {proof}: {'its evidence is not kept any more' if path is None else path}"
        for proof, path in saved.items()
    ]
    _print([*score_lines(score), *(["", "evidence"] if evidence else []), *evidence])
    return 0


def _leader_fields(leader: Leader) -> dict[str, Any]:
    fields = asdict(leader)
    del fields["components_json"]
    return fields | {"components": asdict(_components(leader))}


if __name__ == "__main__":
    run_cli(main)
