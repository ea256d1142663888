"""The configuration of every process: one function per role that reads it, and its dataclass.

Each value comes from the flag, else the environment variable, else the configuration file, else
the default. Nothing is read at import. Knows which settings belong together; the table of them is
`config/options.py`, the dataclasses are in `config/roles.py`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil  # type: ignore[import-untyped]  # ships no types

from mapreduce.config.roles import (
    AxonConfig,
    ChainConfig,
    Level,
    LoggingConfig,
    MinerConfig,
    PeerConfig,
    UpdateConfig,
    ValidatorConfig,
    WalletConfig,
    check_frame,
)
from mapreduce.config.sources import Source, gather
from mapreduce.core.scoring_config import ScoringConfig
from mapreduce.errors import ChainStalled, ConfigError, LocalError, MapReduceError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from mapreduce.config.options import Role
    from mapreduce.config.sources import Settings

__all__ = [
    "AxonConfig",
    "ChainConfig",
    "Level",
    "LoggingConfig",
    "MinerConfig",
    "PeerConfig",
    "UpdateConfig",
    "ValidatorConfig",
    "WalletConfig",
    "all_config",
    "available_memory_bytes",
    "bot_config",
    "miner_config",
    "peer_config",
    "run_cli",
    "validator_config",
]

CGROUP = Path("/sys/fs/cgroup")
EXIT_STALLED = 75  # EX_TEMPFAIL of sysexits.h


def miner_config(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    available_bytes: Callable[[], int] | None = None,
) -> MinerConfig:
    """The configuration of `neurons/miner.py`; `argv` and `environ` default to the process's own.

    Raises:
        ConfigError: an option is unknown or cannot be used; the message names it and its source.
        SystemExit: `--help` or `--version` was answered.
    """
    settings = _gather("miner", argv, environ, "miner.py", "Reduce segments of tensors for peers.")
    return _miner(settings, available_bytes or available_memory_bytes)


def validator_config(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> ValidatorConfig:
    """The configuration of `neurons/validator.py`; raises as `miner_config` does."""
    return _validator(
        _gather("validator", argv, environ, "validator.py", "Bring peers and miners together.")
    )


def all_config(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    available_bytes: Callable[[], int] | None = None,
) -> tuple[ValidatorConfig, MinerConfig]:
    """The two halves of `neurons/all.py`, alike in all they share; raises as `miner_config`."""
    settings = _gather("all", argv, environ, "all.py", "A validator and a miner in one process.")
    return _validator(settings), _miner(settings, available_bytes or available_memory_bytes)


def bot_config(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> PeerConfig:
    """The configuration of `neurons/benchmark.py`; raises as `miner_config` does."""
    description = "Take part in the jobs of a validator as one of its benchmark bots."
    settings = _gather("bot", argv, environ, "benchmark.py", description)
    return replace(_peer(settings), updates=_updates(settings))


def peer_config(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    parser: argparse.ArgumentParser | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> PeerConfig:
    """The configuration of a user's script; raises as `miner_config` does.

    `parser` brings the script's own flags, which come back in `args`; where it defines one of ours,
    as `--netuid`, its default is the default. It is left as it was.
    """
    return _peer(_gather("peer", argv, environ, prog, description, parser))


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and end the process; an error made on purpose becomes one line on stderr.

    The exit code is what `main` returns; 2 for wrong use (`LocalError`), 75 if the chain stood
    still, so that starting again may help, 1 for any other error of ours, 130 for Ctrl+C.
    """
    try:
        code = main() or 0
    except MapReduceError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2 if isinstance(error, LocalError) else 1
        if isinstance(error, ChainStalled):
            code = EXIT_STALLED
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def available_memory_bytes(cgroup: Path = CGROUP) -> int:
    """Memory this process may still take: the machine's, or less where a container sets a limit."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max": no limit
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        available = min(available, max(limit - used, 0))
    return available


def _gather(
    role: Role,
    argv: Sequence[str] | None,
    environ: Mapping[str, str] | None,
    prog: str | None,
    description: str | None,
    script: argparse.ArgumentParser | None = None,
) -> Settings:
    return gather(
        role,
        sys.argv[1:] if argv is None else argv,
        os.environ if environ is None else environ,
        prog=prog,
        description=description,
        script=script,
    )


def _miner(settings: Settings, available_bytes: Callable[[], int]) -> MinerConfig:
    limit, available = settings["miner.memory_limit"], available_bytes()
    if limit.value is not None and limit.value > available:
        settings.warnings.append(
            f"miner.memory_limit = {limit.value} ({limit.origin}) is more than the {available} "
            "bytes of memory available now"
        )
    return MinerConfig(
        memory_limit_bytes=available // 2 if limit.value is None else limit.value,
        max_jobs=settings["miner.max_jobs"].value,
        speedtest=not settings["miner.no_speedtest"].value,
        speedtest_mini=settings["miner.speedtest_mini"].value,
        updates=_updates(settings),
        chain=_chain(settings),
        wallet=_wallet(settings),
        axon=_axon(settings),
        logging=_logging(settings),
        warnings=_warnings(settings),
    )


def _validator(settings: Settings) -> ValidatorConfig:
    frame, window = settings["validator.frame_bytes"], settings["validator.window_bytes"]
    frame_bytes = frame.value
    if frame.source is Source.DEFAULT:  # a smaller window alone is a complete wish
        frame_bytes = min(frame_bytes, window.value)
    check_frame(frame_bytes, window.value, f" ({frame.origin})", f" ({window.origin})")
    return ValidatorConfig(
        max_bandwidth_bits_per_s=settings["max_bandwidth"].value,
        benchmark_hotkeys=settings["benchmark_hotkeys"].value,
        benchmark_s=settings["benchmark.seconds"].value,
        benchmark_bytes_per_day=settings["benchmark.bytes_per_day"].value,
        scoring=_scoring(settings),
        sets_weights=not settings["neuron.disable_set_weights"].value,
        updates=_updates(settings),
        join_timeout_s=settings["validator.join_timeout"].value,
        window_bytes=window.value,
        frame_bytes=frame_bytes,
        audit_budget=settings["validator.audit_budget"].value,
        state=_path(settings["validator.state"].value),
        chain=_chain(settings),
        wallet=_wallet(settings),
        axon=_axon(settings),
        logging=_logging(settings),
        warnings=_warnings(settings),
    )


def _peer(settings: Settings) -> PeerConfig:
    return PeerConfig(
        validator_uid=settings["validator.uid"].value,
        chain=_chain(settings),
        wallet=_wallet(settings),
        logging=_logging(settings),
        args=settings.args,
        warnings=tuple(settings.warnings),
    )


def _updates(settings: Settings) -> UpdateConfig:
    return UpdateConfig(
        level=settings["auto_update"].value,
        every_s=settings["auto_update.every"].value,
        delay_s=settings["auto_update.delay"].value,
    )


def _scoring(settings: Settings) -> ScoringConfig:
    try:
        return ScoringConfig(
            **{
                known.name: settings[f"scoring.{known.name}"].value
                for known in fields(ScoringConfig)
            }
        )
    except ValueError as error:  # two that are allowed alone, but not together
        raise ConfigError(f"scoring: {error}") from None


def _chain(settings: Settings) -> ChainConfig:
    network = settings["subtensor.network"]
    endpoint: str | None = None
    for source, setting in sorted(settings.found["subtensor.chain_endpoint"].items(), reverse=True):
        if source is Source.ENVIRONMENT:
            # The SDK reads BT_CHAIN_ENDPOINT as the address of the network `local`, so it may stand
            # in a shell profile: it must not redirect a process that was told to use finney.
            applies = network.source is Source.DEFAULT or network.value == "local"
        else:
            applies = source >= network.source
        if setting.value is not None and applies:
            endpoint = setting.value
            break
        if setting.value is not None:
            settings.warnings.append(
                f"subtensor.chain_endpoint = {setting.value!r} ({setting.origin}) is ignored: "
                f"subtensor.network = {network.value!r} ({network.origin}) was chosen"
            )
    return ChainConfig(network=network.value, endpoint=endpoint, netuid=settings["netuid"].value)


def _wallet(settings: Settings) -> WalletConfig:
    wallet, hotkey = settings["wallet.name"], settings["wallet.hotkey"]
    name, _, own_hotkey = wallet.value.partition("/")
    if own_hotkey and hotkey.source is wallet.source and hotkey.value != own_hotkey:
        raise ConfigError(
            f"wallet.name = {wallet.value!r} ({wallet.origin}) and "
            f"wallet.hotkey = {hotkey.value!r} ({hotkey.origin}) name different hotkeys; "
            "name it once"
        )
    pair_wins = own_hotkey and wallet.source > hotkey.source
    return WalletConfig(
        name=name,
        hotkey=own_hotkey if pair_wins else hotkey.value,
        path=settings["wallet.path"].value,
    )


def _axon(settings: Settings) -> AxonConfig:
    return AxonConfig(
        ip=settings["axon.ip"].value,
        port=settings["axon.port"].value,
        external_ip=settings["axon.external_ip"].value,
        external_port=settings["axon.external_port"].value,
        lookup_url=settings["axon.lookup_url"].value,
    )


def _logging(settings: Settings) -> LoggingConfig:
    directory = settings["logging.logging_dir"].value
    return LoggingConfig(level=_level(settings), logging_dir=_path(directory))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


def _level(settings: Settings) -> Level:
    """The most talkative level of the strongest source that names one."""
    levels: tuple[Level, ...] = ("trace", "debug", "info")
    for source in sorted(Source, reverse=True):
        for level in levels:
            setting = settings.found[f"logging.{level}"].get(source)
            if setting is not None and setting.value:
                return level
    return "info"


def _warnings(settings: Settings) -> tuple[str, ...]:
    return tuple(dict.fromkeys(settings.warnings))
