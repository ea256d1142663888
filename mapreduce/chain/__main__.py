"""`python -m mapreduce.chain register|stake|show`: what btcli does elsewhere, also for a chain in a
file.

Knows the command line and how to print; the work is in `actions` and `metagraph`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from mapreduce.chain import DEFAULT_CHAIN_PATH, EMBEDDED
from mapreduce.errors import MapReduceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import bittensor as bt

    from mapreduce.chain.metagraph import Metagraph


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. An error is one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return asyncio.run(_run(options))
    except MapReduceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


async def _run(options: argparse.Namespace) -> int:
    # bittensor takes most of a second to import; `--help` and a mistyped flag need none of it.
    from mapreduce.chain.seam import connected

    async with connected(options.network, options.endpoint) as client:
        if options.command == "show":
            return await _show(client, options)
        return await _change(client, options)


async def _change(client: bt.Client, options: argparse.Namespace) -> int:
    from mapreduce.chain.actions import add_stake, register_hotkey
    from mapreduce.chain.metagraph import register_command, require_registered
    from mapreduce.chain.wallets import load_wallet

    wallet = load_wallet(options.wallet, options.hotkey, options.path, coldkey=True)
    hotkey = wallet.hotkey.ss58_address
    if options.command == "register":
        uid = await register_hotkey(client, wallet, options.netuid)
        print(f"registered {hotkey} on netuid {options.netuid} as uid {uid}")
    else:
        command = register_command(
            options.network,
            options.netuid,
            options.wallet,
            options.hotkey,
            wallet_path=options.path,
            endpoint=options.endpoint,
        )
        await require_registered(client, options.netuid, hotkey, command)
        await add_stake(client, wallet, options.netuid, options.amount)
        print(f"staked {options.amount:g} TAO on {hotkey}, netuid {options.netuid}")
    return 0


async def _show(client: bt.Client, options: argparse.Namespace) -> int:
    from mapreduce.chain.metagraph import fetch_metagraph

    metagraph = await fetch_metagraph(client, options.netuid)
    if options.json:
        neurons = [asdict(neuron) for neuron in metagraph.neurons]
        record = {"netuid": metagraph.netuid, "block": metagraph.block, "neurons": neurons}
        print(json.dumps(record, indent=2))
    else:
        print(f"network {options.network}, netuid {metagraph.netuid}, block {metagraph.block}")
        print("\n".join(_table(metagraph)))
    return 0


def _table(metagraph: Metagraph) -> list[str]:
    """The neurons in columns as wide as their longest entry."""
    rows = [("uid", "hotkey", "coldkey", "stake", "permit", "incentive", "updated", "axon")]
    for neuron in metagraph.neurons:
        ip = f"[{neuron.ip}]" if neuron.ip and ":" in neuron.ip else neuron.ip
        rows.append(
            (
                str(neuron.uid),
                neuron.hotkey,
                neuron.coldkey,
                f"{neuron.stake_tao:.3f}",
                "yes" if neuron.validator_permit else "no",
                f"{neuron.incentive:.4f}",
                str(neuron.last_update) if neuron.last_update else "-",
                f"{ip}:{neuron.port}" if ip else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _parser() -> argparse.ArgumentParser:
    chain = argparse.ArgumentParser(add_help=False)
    chain.add_argument(
        "--subtensor.network",
        dest="network",
        default=EMBEDDED,
        metavar="NAME",
        help="finney, test, local, archive, ws://... or embedded[:PATH]; "
        f"embedded alone is {DEFAULT_CHAIN_PATH} (default: %(default)s)",
    )
    chain.add_argument(
        "--subtensor.chain_endpoint",
        dest="endpoint",
        metavar="URL",
        help="ws:// or wss:// address to use instead of the network's own",
    )
    chain.add_argument("--netuid", type=int, default=10, help="the subnet (default: %(default)s)")

    wallet = argparse.ArgumentParser(add_help=False)
    wallet.add_argument("--wallet.name", dest="wallet", required=True, metavar="NAME")
    wallet.add_argument("--wallet.hotkey", dest="hotkey", default="default", metavar="NAME")
    wallet.add_argument(
        "--wallet.path",
        dest="path",
        default="~/.bittensor/wallets",
        metavar="DIR",
        help="(default: %(default)s)",
    )

    parser = argparse.ArgumentParser(
        prog="python -m mapreduce.chain", description="Register, stake and look at a subnet."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "register", parents=[chain, wallet], help="give a hotkey a uid, paid by its coldkey"
    )
    stake = commands.add_parser(
        "stake", parents=[chain, wallet], help="stake TAO of the coldkey on the hotkey"
    )
    stake.add_argument("--amount", type=_tao, required=True, metavar="TAO")
    show = commands.add_parser("show", parents=[chain], help="list the neurons of a subnet")
    show.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _tao(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if not 0 < amount < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of TAO; give a number above 0")
    return amount


if __name__ == "__main__":
    sys.exit(main())
