"""The command line: our flags beside a script's own, the flags of older versions, `--help`.

Knows argparse; knows neither environment nor file, and what flags mean only as far as the table in
`config/options.py` says.
"""

from __future__ import annotations

import argparse
import difflib
import re
from typing import TYPE_CHECKING, Any, NoReturn

from mapreduce import __version__
from mapreduce.config.kinds import Switch
from mapreduce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from mapreduce.config.options import Option

_CONFIG = "config file"  # where --config is stored; a blank: no argument of a script has this name

# Flags of the old SDK, the old subnet and the template that operators have in their start scripts.
_OLD_SWITCHES = {
    "--subtensor._mock": "for a chain without a network use --subtensor.network embedded",
    "--mock": "for a chain without a network use --subtensor.network embedded",
    "--logging.record_log": "use --logging.logging_dir",
    "--no_prompt": "nothing here asks questions",
    "--no_version_checking": "nothing is checked",
    "--strict": "unknown flags are always refused",
    "--subtensor.register_wallet": "",
    "--neuron.epoch_length_override": "",
}
_OLD_WITH_VALUES = {
    "--port.range": "one port is enough: --axon.port",
    "--auto_update": "it is an option of neurons",
    "--axon.max_workers": "",
    "--axon.maxworkers": "",
}
_OLD_FAMILIES = ("--neuron.", "--wandb.", "--blacklist.", "--dendrite.", "--priority.")
# To ignore these would do the very thing that they forbid.
_OLD_REFUSED = ("--neuron.disable_set_weights", "--neuron.axon_off", "--axon_off")


_EPILOG = """\
A flag wins over an environment variable, that over the file, that over the default.
Wallet passwords are read by the SDK: BT_WALLET_PASSWORD, BT_WALLET_PASSWORD_FILE.
"""


class CommandLine:
    """One parsed command line.

    `values` maps keys to (what was typed, the spelling of the flag); `script_defaults` maps the
    keys that the script defines as flags of its own to its defaults; `args` holds the script's
    arguments.

    Raises:
        ConfigError: an unknown flag or a missing value.
        SystemExit: `--help` or `--version` was asked for and answered.
    """

    def __init__(
        self,
        options: Mapping[str, Option],
        argv: Sequence[str],
        *,
        prog: str | None,
        description: str | None,
        default_file: str | None,
        script: argparse.ArgumentParser | None = None,
    ) -> None:
        parser = _Parser(
            usage="%(prog)s [options]" if script is None else script.usage,
            prog=prog if script is None else script.prog,
            description=description if script is None else script.description,
            parents=[] if script is None else [script],
            add_help=script is None or not script.add_help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog=_EPILOG,
        )
        shared = _add_options(parser, options.values(), default_file)
        kept, self.warnings = _without_old_flags(argv, parser.flags())
        self.script_defaults = {key: action.default for key, action in shared.items()}
        try:
            for action in shared.values():  # absent unless given, so that other sources count
                action.default = argparse.SUPPRESS
            args, unknown = parser.parse_known_args(kept)
        finally:
            for key, action in shared.items():
                action.default = self.script_defaults[key]
        if unknown:
            raise ConfigError(_unknown(unknown[0], parser.flags()))

        self.config_file: str | None = vars(args).pop(_CONFIG, None)
        self.values: dict[str, tuple[Any, str]] = {}
        for key, option in options.items():
            if key in shared and hasattr(args, shared[key].dest):
                self.values[key] = (getattr(args, shared[key].dest), option.flag)
            elif key not in shared and hasattr(args, key):
                self.values[key] = vars(args).pop(key)
        self.args = args
        self._dests = {key: action.dest for key, action in shared.items()}

    def fill_in(self, key: str, value: object) -> None:
        """Give the script the final value of a flag that it defines itself."""
        setattr(self.args, self._dests[key], value)


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process: `main` decides how an error looks."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def flags(self) -> dict[str, argparse.Action]:
        return self._option_string_actions


class _Remember(argparse.Action):
    """Stores the value together with the spelling that the user chose."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # as in argparse
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, ("true" if self.nargs == 0 else values, option_string))


def _add_options(
    parser: _Parser, options: Iterable[Option], default_file: str | None
) -> dict[str, argparse.Action]:
    """Add our flags; returns, by key, those that the script had defined itself.

    A script may define `--netuid` and `--validator.uid` as the README's does: they mean ours, with
    the script's default. Any other name of ours that a script uses, a short alias say, is its own.
    """
    taken = dict(parser.flags())
    shared = {}
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options:
        if option.flag in taken:
            shared[option.key] = taken[option.flag]
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        names = [n for n in (option.flag, option.alias) if n is not None and n not in taken]
        metavar = {"metavar": option.key.rpartition(".")[2].upper()}
        switch = {"nargs": 0} if isinstance(option.kind, Switch) else metavar
        groups[option.group].add_argument(
            *names,
            dest=option.key,
            action=_Remember,
            default=argparse.SUPPRESS,
            help=_help(option),
            **switch,
        )
    general = parser.add_argument_group("general")
    if "--config" not in taken:
        found = f"{default_file} where it exists" if default_file else "none"
        general.add_argument(
            "--config",
            dest=_CONFIG,
            metavar="PATH",
            help=f"JSON file with keys named as the flags, without the dashes (default: {found})",
        )
    if "--version" not in taken:
        general.add_argument("--version", action="version", version=__version__)
    return shared


def _help(option: Option) -> str:
    if option.default is not None and not option.default_text:
        shown = f"{option.default:g}" if isinstance(option.default, float) else option.default
        facts = [f"default: {shown}"]
    else:
        facts = [f"default: {option.default_text}"] if option.default_text else []
    if option.env:
        facts.append(f"environment: {option.env}")
    more = f" ({'; '.join(facts)})" if facts else ""
    return f"{option.help}{more}".replace("%", "%%")


def _without_old_flags(argv: Sequence[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """`argv` without the flags of older versions (and their values), and a warning for each."""
    kept: list[str] = []
    warnings: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, _, value = token.partition("=")
        if token == "--":
            return [*kept, token, *rest], warnings
        if name in known or not _is_old(name):
            kept.append(token)
            continue
        if name in _OLD_REFUSED:
            raise ConfigError(f"{name} is not supported, and to ignore it would do what it forbids")
        if name in _OLD_SWITCHES:
            if rest and rest[0].lower() in ("true", "false"):
                rest.pop(0)
        elif not value:
            while rest and (not rest[0].startswith("-") or re.fullmatch(r"-[\d.]+", rest[0])):
                rest.pop(0)
        hint = _OLD_SWITCHES.get(name) or _OLD_WITH_VALUES.get(name)
        warnings.append(f"{name} has no effect any more{f': {hint}' if hint else ''}")
    return kept, warnings


def _is_old(name: str) -> bool:
    return (
        name in _OLD_SWITCHES
        or name in _OLD_WITH_VALUES
        or name in _OLD_REFUSED
        or name.startswith(_OLD_FAMILIES)
    )


def _unknown(token: str, known: Collection[str]) -> str:
    if not token.startswith("-"):
        return f"unexpected argument {token!r}: every setting has a flag (see --help)"
    name = token.partition("=")[0]
    return f"unknown flag {name}{did_you_mean(name, known)} (see --help)"


def did_you_mean(name: str, known: Collection[str]) -> str:
    """ ", did you mean ...?" where a known name is close, otherwise nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""
