"""Opening wallets. Knows the files of a wallet and what their owner must do when one cannot be
used; knows nothing of a chain. No password and no mnemonic is ever printed or logged.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import bittensor as bt
from bittensor.sp_core import KeyfileError, WrongPasswordError, get_password_from_environment

from mapreduce.errors import ConfigError, WalletError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bittensor.keyfiles import Keyfile
    from bittensor.sp_core import Keypair

DEFAULT_WALLET_PATH: Final = "~/.bittensor/wallets"

_PASSWORD: Final = "BT_WALLET_PASSWORD"
_PASSWORD_FILE: Final = "BT_WALLET_PASSWORD_FILE"


class Keys(Protocol):
    """What the chain's writers need of a wallet: its keys, unlocked."""

    @property
    def coldkey(self) -> Keypair:
        """Owns the money and the hotkeys."""

    @property
    def hotkey(self) -> Keypair:
        """Signs for the neuron."""


def load_wallet(
    name: str, hotkey: str = "default", path: str = DEFAULT_WALLET_PATH, *, coldkey: bool = False
) -> bt.Wallet:
    """The wallet with its hotkey ready to sign; with `coldkey` also the coldkey.

    An encrypted key is unlocked with `BT_WALLET_PASSWORD`, else with what the file holds that
    `BT_WALLET_PASSWORD_FILE` names. Nothing is asked at the terminal. A hotkey signs without
    the coldkey, so the coldkey's file may be on another machine unless it is asked for.

    Raises:
        WalletError: a file is missing, unreadable or damaged, or locked with another password.
    """
    wallet = _named(name, hotkey, path)
    _unlock(wallet, wallet.hotkey_file, wallet.get_hotkey)
    if coldkey:
        _unlock(wallet, wallet.coldkey_file, wallet.get_coldkey)
    return wallet


def create_wallet(path: str, name: str, hotkey: str = "default") -> bt.Wallet:
    """A throw-away wallet, unencrypted, for tests and demonstrations; its mnemonics are shown to
    nobody.

    Another hotkey of an existing wallet shares its coldkey.

    Raises:
        WalletError: the hotkey exists already, or the directory cannot be written.
    """
    wallet = _named(name, hotkey, path)
    try:
        if not wallet.coldkey_file.exists_on_device():
            wallet.create_new_coldkey(use_password=False, suppress=True)
        # Creating over an existing file would ask at the terminal.
        if wallet.hotkey_file.exists_on_device():
            raise WalletError(f"{wallet.hotkey_file.path} exists already; choose another hotkey")
        wallet.create_new_hotkey(use_password=False, suppress=True)
    except OSError as error:
        raise WalletError(f"cannot create the wallet {name!r} in {path}: {error}") from error
    return wallet


def create_command(name: str, hotkey: str, path: str) -> str:
    """The command that creates such a wallet."""
    where = "" if _same(path, DEFAULT_WALLET_PATH) else f" --wallet-path {path}"
    return f"btcli wallet create --wallet {name} --wallet-hotkey {hotkey}{where}"


def _same(one: str, other: str) -> bool:
    return Path(one).expanduser() == Path(other).expanduser()


def _named(name: str, hotkey: str, path: str) -> bt.Wallet:
    try:
        return bt.Wallet(name, hotkey, str(Path(path).expanduser()))
    except ValueError as error:
        raise ConfigError(f"wallet.name = {name!r}: {error}") from error


def _unlock(wallet: bt.Wallet, file: Keyfile, load: Callable[[str | None], object]) -> None:
    if not file.exists_on_device():
        command = create_command(wallet.name, wallet.hotkey_str, wallet.path)
        raise WalletError(f"no key file {file.path}; create the wallet with `{command}`")
    try:
        password = None
        if file.is_encrypted():
            password = _password(file)
            if not password:
                raise WalletError(
                    f"{file.path} is encrypted; put its password in {_PASSWORD} or in a file that "
                    f"{_PASSWORD_FILE} names"
                )
        load(password)
    except WrongPasswordError as error:
        raise WalletError(f"wrong password for {file.path}; see {_PASSWORD}") from error
    except OSError as error:
        raise WalletError(f"cannot read {file.path}: {error.strerror or error}") from error
    except (KeyfileError, ValueError) as error:
        raise WalletError(f"{file.path} is no usable key file: {error}") from error


def _password(file: Keyfile) -> str | None:
    """The password that the environment holds for a key file; the SDK's order of precedence."""
    password: str | None = os.environ.get(_PASSWORD) or get_password_from_environment(
        file.env_var_name()
    )
    password_file = os.environ.get(_PASSWORD_FILE)
    if not password and password_file:
        try:
            password = Path(password_file).expanduser().read_text().strip()
        except OSError as error:
            raise WalletError(f"cannot read {_PASSWORD_FILE} = {password_file}: {error}") from error
    return password
