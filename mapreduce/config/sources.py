"""Where settings come from: flags, environment variables, the file, defaults - in that order.

Knows JSON and the order; what settings mean together is for `config/__init__.py`. Nothing is read
before `gather` is called.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapreduce.config.flags import CommandLine, did_you_mean
from mapreduce.config.options import OPTIONS, VALIDATOR, options_of, read
from mapreduce.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from mapreduce.config.options import Option, Role

DEFAULT_FILE = "validator.config.json"


class Source(IntEnum):
    """Who set a value; the larger one wins."""

    DEFAULT = 0
    FILE = 1
    ENVIRONMENT = 2
    FLAG = 3


@dataclass(frozen=True, slots=True)
class Setting:
    """One value in its normal form, and where it was found in the words of a message."""

    value: Any  # each option has its own type; the dataclasses in roles.py restore it
    source: Source
    origin: str


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one role, the warnings on the way, and a script's own arguments."""

    found: Mapping[str, Mapping[Source, Setting]]
    warnings: list[str]
    args: argparse.Namespace

    def __getitem__(self, key: str) -> Setting:
        """The setting that wins."""
        by_source = self.found[key]
        return by_source[max(by_source)]


def gather(
    role: Role,
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    prog: str | None,
    description: str | None,
    script: argparse.ArgumentParser | None = None,
) -> Settings:
    """Read every source for `role`; `script` brings the flags of the user's own program.

    Raises:
        ConfigError: an unknown flag or key, or a value that is not allowed.
        SystemExit: `--help` or `--version` was asked for and answered.
    """
    options = options_of(role)
    default_file = DEFAULT_FILE if role in VALIDATOR else None
    line = CommandLine(
        options,
        argv,
        prog=prog,
        description=description,
        default_file=default_file,
        script=script,
    )
    found = {
        key: {Source.DEFAULT: Setting(option.default, Source.DEFAULT, "default")}
        for key, option in options.items()
    }

    def add(key: str, value: object, source: Source, origin: str, *, typed: bool) -> None:
        normal = read(options[key], value, origin, typed=typed)
        found[key][source] = Setting(normal, source, origin)

    for key, default in line.script_defaults.items():
        if default is not None:
            add(key, default, Source.DEFAULT, "the script's own default", typed=False)
    path = line.config_file or default_file
    if path is not None and (line.config_file is not None or Path(path).exists()):
        for key, value in _read_file(Path(path), options).items():
            add(key, value, Source.FILE, f"file {path}", typed=False)
    for key, option in options.items():
        if option.env and environ.get(option.env):  # an empty variable is an unset one
            origin = f"environment variable {option.env}"
            add(key, environ[option.env], Source.ENVIRONMENT, origin, typed=True)
    for key, (value, flag) in line.values.items():
        add(key, value, Source.FLAG, f"flag {flag}", typed=isinstance(value, str))

    settings = Settings(found, line.warnings, line.args)
    for key in line.script_defaults:
        line.fill_in(key, settings[key].value)
    return settings


def _read_file(path: Path, options: Mapping[str, Option]) -> dict[str, object]:
    """The keys of a configuration file, all of them known to the role."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason}, byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond all measure
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, _Object):
        raise ConfigError(f'{path} must hold one JSON object: {{"netuid": 10, ...}}')
    values: dict[str, object] = {}
    for key, value in content.pairs:
        if key in values:
            raise ConfigError(f"{path}: the key {key!r} stands there twice")
        if key not in options:
            raise ConfigError(_unknown_key(path, key, value, options))
        values[key] = value
    return values


@dataclass(frozen=True, slots=True)
class _Object:
    """A JSON object as it stands in the text: a dict would hide repeated keys."""

    pairs: list[tuple[str, Any]]


def _unknown_key(path: Path, key: str, value: object, options: Mapping[str, Option]) -> str:
    said = f"{path}: unknown key {key!r}"
    if key in OPTIONS:
        roles = " and ".join(sorted(OPTIONS[key].roles - {"all"}))
        return f"{said} for this role: it is an option of the {roles}"
    if isinstance(value, _Object) and value.pairs:
        return f'{said}: keys are not nested, write "{key}.{value.pairs[0][0]}": ...'
    return said + (did_you_mean(key, options) or f"; known: {', '.join(options)}")
