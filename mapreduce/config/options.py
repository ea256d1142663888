"""The table of every option: its names, its values, its default, its help.

Flags, environment variables, keys of the configuration file, `--help` and the checks of the
dataclasses in `roles.py` all come from `OPTIONS`. Knows nothing of where a value came from
(`sources.py`) or of what is built from it (`__init__.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from mapreduce.config.kinds import (
    SHARE,
    FilePath,
    Hotkeys,
    IpAddress,
    Network,
    NotAllowed,
    Number,
    Seconds,
    Switch,
    UpdateLevel,
    Url,
    WalletName,
    Whole,
)
from mapreduce.core.challenge import DEFAULT_BUDGET
from mapreduce.core.partition import BLOCK_BYTES
from mapreduce.core.scoring_config import ScoringConfig
from mapreduce.errors import ConfigError
from mapreduce.wire.terms import MAX_FRAME_BYTES, MAX_WINDOW_BYTES

if TYPE_CHECKING:
    from mapreduce.config.kinds import Kind

Role = Literal["miner", "validator", "all", "bot", "peer"]

MINER: frozenset[Role] = frozenset({"miner", "all"})
VALIDATOR: frozenset[Role] = frozenset({"validator", "all"})
BOT: frozenset[Role] = frozenset({"bot"})
PEER: frozenset[Role] = frozenset({"peer", "bot"})
SERVERS = MINER | VALIDATOR
NEURONS = SERVERS | BOT
EVERYBODY = SERVERS | PEER

MAX_U16 = 65535  # uids and netuids are u16 on the chain


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting. `key` names it in the file, `--key` on the command line; default None: unset."""

    key: str
    kind: Kind
    group: str
    help: str
    default: object = None
    default_text: str = ""
    alias: str | None = None
    env: str | None = None
    roles: frozenset[Role] = EVERYBODY

    @property
    def flag(self) -> str:
        return f"--{self.key}"


_CHAIN = "chain"
_WALLET = "wallet"
_AXON = "axon (the one TCP port this process serves on)"
_MINER = "miner"
_VALIDATOR = "validator"
_BENCHMARKS = "benchmarks (how miners are measured)"
_SCORING = "scoring (validators of one subnet should agree on these)"
_PEER = "peer"
_UPDATES = "updates (releases are tags of the git repository this runs from)"
_LOGGING = "logging"

_PORT = Whole(0, 65535)
_SERVED_PORT = Whole(1, 65535)

_TABLE = (
    Option(
        key="netuid",
        kind=Whole(0, MAX_U16),
        group=_CHAIN,
        default=10,
        help="the subnet's number",
    ),
    Option(
        key="subtensor.network",
        kind=Network(),
        group=_CHAIN,
        alias="--network",
        env="BT_NETWORK",
        default="finney",
        help="the chain: finney, test, local, archive, a ws:// or wss:// URL, or embedded[:PATH] "
        "for a chain in one file on this machine",
    ),
    Option(
        key="subtensor.chain_endpoint",
        kind=Network(urls_only=True),
        group=_CHAIN,
        alias="--chain-endpoint",
        env="BT_CHAIN_ENDPOINT",
        help="a node to use instead of the network's own; the environment variable counts, as in "
        "the SDK, for the network local (or where no network is named)",
    ),
    Option(
        key="wallet.name",
        kind=WalletName(pair=True, placeholder="your wallet name"),
        group=_WALLET,
        alias="--wallet-name",
        env="BT_WALLET",
        default="default",
        help="name of the wallet (coldkey); NAME/HOTKEY names the hotkey too",
    ),
    Option(
        key="wallet.hotkey",
        kind=WalletName(placeholder="your validator hotkey"),
        group=_WALLET,
        alias="--wallet-hotkey",
        env="BT_WALLET_HOTKEY",
        default="default",
        help="name of the hotkey",
    ),
    Option(
        key="wallet.path",
        kind=FilePath(),
        group=_WALLET,
        alias="--wallet-path",
        env="BT_WALLET_PATH",
        default="~/.bittensor/wallets",
        help="directory of the wallets",
    ),
    Option(
        key="axon.port",
        kind=_PORT,
        group=_AXON,
        alias="--axon-port",
        default=8091,
        roles=SERVERS,
        help="port to listen on; 0: any free one",
    ),
    Option(
        key="axon.ip",
        kind=IpAddress(),
        group=_AXON,
        alias="--axon-ip",
        default="0.0.0.0",
        roles=SERVERS,
        help='IPv4 or IPv6 address to listen on; "::" for every address of both',
    ),
    Option(
        key="axon.external_ip",
        kind=IpAddress(public=True),
        group=_AXON,
        alias="--external-ip",
        default_text="by axon.lookup_url, else axon.ip, else as the chain shows it",
        roles=SERVERS,
        help="address published on the chain, for hosts behind NAT or a proxy",
    ),
    Option(
        key="axon.external_port",
        kind=_SERVED_PORT,
        group=_AXON,
        alias="--external-port",
        default_text="the port listened on",
        roles=SERVERS,
        help="port published on the chain",
    ),
    Option(
        key="axon.lookup_url",
        kind=Url(),
        group=_AXON,
        default_text="nobody is asked",
        roles=SERVERS,
        help="a service that answers with the IP address it is asked from, as plain text; where no "
        "axon.external_ip is given, that is what is published",
    ),
    Option(
        key="miner.max_jobs",
        kind=Whole(1, 1024),
        group=_MINER,
        default=8,
        roles=MINER,
        help="jobs served at the same time",
    ),
    Option(
        key="miner.memory_limit",
        kind=Whole(16 * 2**20, 2**50, unit="bytes", sizes=True),
        group=_MINER,
        default_text="half of the memory available at start",
        roles=MINER,
        help="bytes that all jobs together may reserve, as in 17179869184, 512MB or 4GiB",
    ),
    Option(
        key="miner.no_speedtest",
        kind=Switch(),
        group=_MINER,
        default=False,
        default_text="they are allowed",
        roles=MINER,
        help="run no speed test when a validator asks for one (at most one in 6 hours; it counts "
        "for nothing in the score)",
    ),
    Option(
        key="miner.speedtest_mini",
        kind=Url(),
        group=_MINER,
        default_text="speedtest.net's nearest server",
        roles=MINER,
        help="the Speedtest Mini server to test against",
    ),
    Option(
        key="max_bandwidth",
        # The lower bound catches "10" written for 10 Gbit/s.
        kind=Whole(1_000_000, 10**15, unit="bits per second"),
        group=_BENCHMARKS,
        default=10737418240,
        roles=VALIDATOR,
        help="bits per second that all benchmark bots together can carry, and will not exceed; "
        "miners above its part by scoring.capacity_ratio are not told apart",
    ),
    Option(
        key="benchmark_hotkeys",
        kind=Hotkeys(),
        group=_BENCHMARKS,
        default=(),
        default_text="none",
        roles=VALIDATOR,
        help="ss58 hotkeys of the benchmark bots: a list in the file, commas between them here",
    ),
    Option(
        key="benchmark.seconds",
        kind=Seconds(300),
        group=_BENCHMARKS,
        default=10.0,
        roles=VALIDATOR,
        help="seconds that the miners of one benchmark are kept busy",
    ),
    Option(
        key="benchmark.bytes_per_day",
        kind=Whole(0, 10**18, unit="bytes", sizes=True),
        group=_BENCHMARKS,
        default=2 * 10**12,
        roles=VALIDATOR,
        help="bytes, in and out of all bots together, that benchmarks may take in 24 hours; 0: "
        "nothing is measured",
    ),
    Option(
        key="validator.join_timeout",
        kind=Seconds(86400),
        group=_VALIDATOR,
        alias="--join_timeout",
        default=60.0,
        roles=VALIDATOR,
        help="seconds that a job waits for its last rank",
    ),
    Option(
        key="validator.window_bytes",
        kind=Whole(BLOCK_BYTES, MAX_WINDOW_BYTES, unit="bytes", multiple=BLOCK_BYTES, sizes=True),
        group=_VALIDATOR,
        alias="--window_bytes",
        default=4 * 2**20,
        roles=VALIDATOR,
        help="bytes a peer may be ahead of a miner, written into grants",
    ),
    Option(
        key="validator.frame_bytes",
        kind=Whole(BLOCK_BYTES, MAX_FRAME_BYTES, unit="bytes", multiple=BLOCK_BYTES, sizes=True),
        group=_VALIDATOR,
        alias="--frame_bytes",
        default=2**20,
        roles=VALIDATOR,
        help="largest payload of a frame in bytes, at most the window; written into grants",
    ),
    Option(
        key="validator.audit_budget",
        kind=SHARE,
        group=_VALIDATOR,
        alias="--audit_budget",
        default=DEFAULT_BUDGET,
        roles=VALIDATOR,
        help="what audits may add to the traffic of a job, as a share of it; 0: no samples are "
        "taken",
    ),
    Option(
        key="validator.state",
        kind=FilePath(),
        group=_VALIDATOR,
        alias="--state",
        default_text="~/.mapreduce/HOTKEY.sqlite",
        roles=VALIDATOR,
        help="the file with measurements, scores, proofs of lies and jobs; kept from run to run",
    ),
    Option(
        key="neuron.disable_set_weights",
        kind=Switch(),
        group=_VALIDATOR,
        default=False,
        default_text="weights are set",
        roles=VALIDATOR,
        help="a dry run: log the weights instead of setting them on the chain",
    ),
    Option(
        key="validator.uid",
        kind=Whole(0, MAX_U16),
        group=_PEER,
        alias="--validator-uid",
        default=0,
        roles=PEER,
        help="uid of the validator that coordinates the job",
    ),
    Option(
        key="auto_update",
        kind=UpdateLevel(),
        group=_UPDATES,
        # A process changes its own code only where somebody wrote so (the example file does).
        default="no",
        roles=NEURONS,
        help="the largest step that this process takes by itself to a newer release: major, minor "
        "or patch; notify: only tell of new releases; no: do not look",
    ),
    Option(
        key="auto_update.every",
        kind=Seconds(7 * 86400),
        group=_UPDATES,
        default=3600.0,
        roles=NEURONS,
        help="seconds from one look for new releases to the next",
    ),
    Option(
        key="auto_update.delay",
        kind=Number(0, 7 * 86400),
        group=_UPDATES,
        default=1800.0,
        roles=NEURONS,
        help="seconds that an update waits at most, by chance, so that not all neurons of a subnet "
        "change at once",
    ),
    Option(
        key="logging.info",
        kind=Switch(),
        group=_LOGGING,
        alias="--info",
        default_text="this level",
        help="what an operator wants to know",
    ),
    Option(
        key="logging.debug",
        kind=Switch(),
        group=_LOGGING,
        alias="--debug",
        help="what a developer wants to know",
    ),
    Option(
        key="logging.trace",
        kind=Switch(),
        group=_LOGGING,
        alias="--trace",
        help="everything, frame by frame",
    ),
    Option(
        key="logging.logging_dir",
        kind=FilePath(),
        group=_LOGGING,
        alias="--logging-dir",
        default_text="no file",
        help="directory for a log file beside the messages on stderr",
    ),
)

_SCORES = tuple(
    Option(
        key=f"scoring.{constant.name}",
        kind=Whole(constant.metadata["low"], constant.metadata["high"])
        if isinstance(constant.default, int)
        else Number(constant.metadata["low"], constant.metadata["high"]),
        group=_SCORING,
        default=constant.default,
        roles=VALIDATOR,
        help=constant.metadata["help"],
    )
    for constant in fields(ScoringConfig)
)

OPTIONS = {option.key: option for option in (*_TABLE, *_SCORES)}


def options_of(role: Role) -> dict[str, Option]:
    """The options a role understands, by key, in the order of the help."""
    return {key: option for key, option in OPTIONS.items() if role in option.roles}


def read(option: Option, value: object, origin: str = "", *, typed: bool = False) -> object:
    """`value` in its normal form; `typed`: a person wrote it as text, on a command line say.

    Raises:
        ConfigError: names the key, the value, `origin` and what is allowed.
    """
    try:
        return option.kind.from_text(str(value)) if typed else option.kind.check(value)
    except ValueError as error:
        reason = f" ({error})" if isinstance(error, NotAllowed) else ""
        source = f" from {origin}" if origin else ""
        raise ConfigError(
            f"{option.key} = {_short(value)}{source} cannot be used{reason}; "
            f"allowed: {option.kind.allowed}"
        ) from None


def check(key: str, value: object) -> None:
    """The check of one field of a dataclass; raises as `read` does."""
    read(OPTIONS[key], value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
