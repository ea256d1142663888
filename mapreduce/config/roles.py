"""What each process is told: one frozen dataclass per role, checked when it is made.

Units are in the names of the fields. Knows the limits of every value through the table in
`config/options.py`; knows nothing of where values come from (`config/__init__.py`).
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mapreduce.config.options import check
from mapreduce.core.challenge import DEFAULT_BUDGET
from mapreduce.core.scoring_config import ScoringConfig
from mapreduce.errors import ConfigError

Level = Literal["info", "debug", "trace"]
UpdateLevel = Literal["major", "minor", "patch", "notify", "no"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainConfig:
    """Which chain, and which subnet of it."""

    network: str = "finney"
    endpoint: str | None = None
    netuid: int = 10

    def __post_init__(self) -> None:
        check("subtensor.network", self.network)
        check("netuid", self.netuid)
        if self.endpoint is not None:
            check("subtensor.chain_endpoint", self.endpoint)

    @property
    def address(self) -> str:
        """What to connect to: the endpoint where one is set, otherwise the network."""
        return self.endpoint or self.network


@dataclass(frozen=True, slots=True, kw_only=True)
class WalletConfig:
    """Which wallet; `path` may begin with `~`."""

    name: str = "default"
    hotkey: str = "default"
    path: str = "~/.bittensor/wallets"

    def __post_init__(self) -> None:
        check("wallet.name", self.name)
        if "/" in self.name:
            raise ConfigError(f"wallet.name = {self.name!r}: the hotkey belongs to wallet.hotkey")
        check("wallet.hotkey", self.hotkey)
        check("wallet.path", self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class AxonConfig:
    """Where to listen and, behind NAT, which address to publish; port 0 is any free port."""

    ip: str = "0.0.0.0"
    port: int = 8091
    external_ip: str | None = None
    external_port: int | None = None
    lookup_url: str | None = None

    def __post_init__(self) -> None:
        check("axon.ip", self.ip)
        check("axon.port", self.port)
        if self.external_ip is not None:
            check("axon.external_ip", self.external_ip)
        if self.external_port is not None:
            check("axon.external_port", self.external_port)
        if self.lookup_url is not None:
            check("axon.lookup_url", self.lookup_url)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """How much is logged, and the directory of the log file (none: stderr only)."""

    level: Level = "info"
    logging_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.level not in ("info", "debug", "trace"):
            raise ConfigError(f"logging level {self.level!r}; allowed: info, debug, trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """Which newer releases a process installs by itself, how often it looks, and how long it waits
    at most before it takes one."""

    level: UpdateLevel = "no"
    every_s: float = 3600.0
    delay_s: float = 1800.0

    def __post_init__(self) -> None:
        check("auto_update", self.level)
        check("auto_update.every", self.every_s)
        check("auto_update.delay", self.delay_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class MinerConfig:
    """A miner. `speedtest_mini` is the server of its speed tests, None for the nearest public one.
    `warnings` are texts for the log, which is not set up yet when they arise."""

    memory_limit_bytes: int
    max_jobs: int = 8
    speedtest: bool = True
    speedtest_mini: str | None = None
    updates: UpdateConfig = field(default_factory=UpdateConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    wallet: WalletConfig = field(default_factory=WalletConfig)
    axon: AxonConfig = field(default_factory=AxonConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check("miner.memory_limit", self.memory_limit_bytes)
        check("miner.max_jobs", self.max_jobs)
        if self.speedtest_mini is not None:
            check("miner.speedtest_mini", self.speedtest_mini)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatorConfig:
    """A validator. `max_bandwidth_bits_per_s` is what all its bots carry together, at most
    `benchmark_bytes_per_day`; `sets_weights` False is a dry run."""

    max_bandwidth_bits_per_s: int = 10737418240
    benchmark_hotkeys: tuple[str, ...] = ()
    benchmark_s: float = 10.0
    benchmark_bytes_per_day: int = 2 * 10**12
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    sets_weights: bool = True
    updates: UpdateConfig = field(default_factory=UpdateConfig)
    join_timeout_s: float = 60.0
    window_bytes: int = 4 * 2**20
    frame_bytes: int = 2**20
    audit_budget: float = DEFAULT_BUDGET
    state: Path | None = None
    chain: ChainConfig = field(default_factory=ChainConfig)
    wallet: WalletConfig = field(default_factory=WalletConfig)
    axon: AxonConfig = field(default_factory=AxonConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check("max_bandwidth", self.max_bandwidth_bits_per_s)
        check("benchmark_hotkeys", self.benchmark_hotkeys)
        check("benchmark.seconds", self.benchmark_s)
        check("benchmark.bytes_per_day", self.benchmark_bytes_per_day)
        check("validator.join_timeout", self.join_timeout_s)
        check("validator.window_bytes", self.window_bytes)
        check("validator.frame_bytes", self.frame_bytes)
        check("validator.audit_budget", self.audit_budget)
        check_frame(self.frame_bytes, self.window_bytes)

    def state_path(self, hotkey: str) -> Path:
        """The file with this validator's state."""
        return self.state or Path("~/.mapreduce").expanduser() / f"{hotkey}.sqlite"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """A training script or a benchmark bot; `args` holds the flags that a script defined itself."""

    validator_uid: int = 0
    updates: UpdateConfig = field(default_factory=UpdateConfig)
    chain: ChainConfig = field(default_factory=ChainConfig)
    wallet: WalletConfig = field(default_factory=WalletConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    args: Namespace = field(default_factory=Namespace, compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check("validator.uid", self.validator_uid)


def check_frame(
    frame_bytes: int, window_bytes: int, frame_origin: str = "", window_origin: str = ""
) -> None:
    """A frame must fit into the window; the origins say where the two values came from."""
    if frame_bytes > window_bytes:
        raise ConfigError(
            f"validator.frame_bytes = {frame_bytes}{frame_origin} cannot be used; allowed: up to "
            f"validator.window_bytes = {window_bytes}{window_origin}"
        )
