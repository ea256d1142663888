"""`python -m mapreduce.speedtest`: a validator's operator has a miner test the speed of its link.

Knows how a speed test reads, and how long to wait for it. What it tells is in `wire/speedtest.py`;
how the miner makes it, in `services/speedtest.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mapreduce.config import peer_config, run_cli
from mapreduce.errors import Refused, Unavailable
from mapreduce.wire.speedtest import SpeedTestAnswer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp import ClientSession
    from bittensor.sp_core import Keypair

    from mapreduce.config import PeerConfig
    from mapreduce.net.client import Remote

DESCRIPTION = """\
Have a miner run speedtest-cli, and show what it says. The wallet's hotkey needs a validator permit.
A miner runs one test in 6 hours, whoever asks, and none while it serves jobs; before its time is up
it tells of the last one.
"""
NOTICE = "the figures are the miner's own word: information only, with no weight in any score"
POLL_S = 2.0
LONGEST_S = 150.0  # the miner stops the tool after 120 s


# For people -----------------------------------------------------------------------------------


def answer_lines(miner: str, answer: SpeedTestAnswer, now: float) -> list[str]:
    """All that a miner tells of its speed test."""
    lines = [f"miner      {miner}"]
    if answer.at is None or answer.state == "never":
        return [*lines, "speed test never: none since the miner was started"]
    what = f"{answer.state}, begun {_utc(answer.at)}, {_ago(now - answer.at)}"
    if answer.reason:
        what += f": {answer.reason}"
    lines.append(f"speed test {what}")
    if answer.state == "done":
        ping = "-" if answer.ping_s is None else f"{answer.ping_s * 1e3:.1f} ms"
        lines += [
            f"download   {_mbit_per_s(answer.download_bits_per_s)}",
            f"upload     {_mbit_per_s(answer.upload_bits_per_s)}",
            f"ping       {ping}",
            f"server     {_server(answer)}",
        ]
    if answer.next_at is not None:
        lines.append(f"next       from {_utc(answer.next_at)}")
    return [*lines, "", NOTICE]


def _server(answer: SpeedTestAnswer) -> str:
    server = answer.server
    if server is None:
        return "-"
    names = ", ".join(filter(None, (server.name, server.sponsor, server.country)))
    return f"{names} ({server.host})" if server.host else names or "-"


def _mbit_per_s(bits_per_s: float | None) -> str:
    return "-" if bits_per_s is None else f"{bits_per_s / 1e6:.1f} Mbit/s"


def _utc(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _ago(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _print(lines: Sequence[str]) -> None:
    # What a stranger wrote must not drive the terminal.
    print("\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines))


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Where from -----------------------------------------------------------------------------------


async def ask(http: ClientSession, key: Keypair, miner: Remote, *, start: bool) -> SpeedTestAnswer:
    """The miner's speed test; with `start` it begins one if it may.

    Raises Unavailable, Refused, BadMessage.
    """
    # Imported late: --help needs no bittensor.
    from mapreduce.net.client import call

    method = "POST" if start else "GET"
    try:
        return await call(http, key, miner, method, "/v1/speedtest", None, SpeedTestAnswer)
    except Refused as error:
        if error.code != "http_error" or error.status != 404:
            raise
        text = f"{miner} knows no speed tests: it is no miner, or an older version"
        raise Refused(text, code=error.code, status=404) from None


async def wait_for_end(
    http: ClientSession, key: Keypair, miner: Remote, answer: SpeedTestAnswer
) -> SpeedTestAnswer:
    """Asks until the test that runs has ended, and says so on stderr; raises as `ask` does."""
    began = time.monotonic()
    while answer.state == "running":
        waited_s = time.monotonic() - began
        _progress(f"{miner} is testing: {waited_s:.0f} s")
        await asyncio.sleep(POLL_S)
        try:
            answer = await ask(http, key, miner, start=False)
        except Unavailable as error:  # its link is as full as it gets
            if waited_s > LONGEST_S:
                raise
            _progress(str(error))
        else:
            if answer.state == "running" and waited_s > LONGEST_S:
                raise Unavailable(f"{miner} is not done with its speed test after {waited_s:.0f} s")
    return answer


async def run(config: PeerConfig, uid: int, *, show: bool) -> tuple[Remote, SpeedTestAnswer]:
    """The speed test of that miner once it has ended, or with `show` the last one as it is."""
    from mapreduce.chain.wallets import load_wallet
    from mapreduce.net.client import make_http_session
    from mapreduce.services.joining import find_neuron

    key = load_wallet(config.wallet.name, config.wallet.hotkey, config.wallet.path).hotkey
    chain = config.chain
    miner = await find_neuron("miner", chain.network, chain.netuid, uid, endpoint=chain.endpoint)
    async with make_http_session() as http:
        answer = await ask(http, key, miner, start=not show)
        if show:
            return miner, answer
        if answer.state == "running":
            return miner, await wait_for_end(http, key, miner, answer)
    if answer.state == "done" and answer.next_at is not None:
        _progress(f"no new test before {_utc(answer.next_at)}: this is the last one")
    return miner, answer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mapreduce.speedtest", description=DESCRIPTION)
    parser.add_argument(
        "--miner.uid", dest="miner_uid", type=int, required=True, metavar="UID", help="which miner"
    )
    parser.add_argument("--show", action="store_true", help="start none, show the last one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    config = peer_config(argv, parser=parser)
    for warning in config.warnings:
        _progress(f"warning: {warning}")
    options = config.args
    miner, answer = asyncio.run(run(config, options.miner_uid, show=options.show))
    if options.json:
        fields = {"uid": options.miner_uid, "hotkey": miner.hotkey, "speedtest": asdict(answer)}
        print(json.dumps(fields, indent=2))
    else:
        _print(answer_lines(f"{miner}, {miner.hotkey}", answer, time.time()))
    return 1 if answer.state == "failed" else 0


if __name__ == "__main__":
    run_cli(main)
