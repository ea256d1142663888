"""The releases of this program on this machine: the checkout they come from, and the environments
they are installed in.

A release is cloned and installed into `.releases/X.Y.Z` of the checkout, beside the environment
that runs; the checkout itself is never changed. Several neurons may share a checkout: each has a
file there that says which release it runs. Knows git, venv, pip and these files; knows neither
which release is wanted (`core/releases.py`) nor what runs in it (`services/supervisor.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from mapreduce import __version__
from mapreduce.commands import CommandFailed, CommandTimedOut, run_command
from mapreduce.core.releases import Release, read_tags
from mapreduce.core.versions import Version
from mapreduce.errors import LocalError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

ROOT: Final = Path(__file__).resolve().parents[1]
DIRECTORY: Final = ".releases"
GIT_TIMEOUT_S: Final = 120.0
INSTALL_TIMEOUT_S: Final = 1800.0  # some gigabytes where torch comes with CUDA
CHECK_TIMEOUT_S: Final = 120.0
MAX_OUTPUT_BYTES: Final = 2**20
MAX_FAILED: Final = 64
MAX_STATE_BYTES: Final = 2**19
LOCK_INTERVAL_S: Final = 0.5
OF_A_HOOK: Final = frozenset(
    f"GIT_{name}" for name in ("DIR", "WORK_TREE", "INDEX_FILE", "PREFIX", "OBJECT_DIRECTORY")
)


class NotUpdatable(LocalError):
    """This program cannot be updated where it is; the message says why."""


class BadRelease(LocalError):
    """A release that is not what its tag says, or does not pass its own checks."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """A git checkout of this project with a remote to ask for releases."""

    root: Path
    url: str

    @classmethod
    async def find(cls) -> Self:
        """The checkout that the running code is in. Raises NotUpdatable."""
        try:
            top = (await _git(ROOT, "rev-parse", "--show-toplevel")).strip()
            if top != str(ROOT):
                raise NotUpdatable(f"{ROOT} lies in the git checkout of something else, {top}")
            url = (await _git(ROOT, "remote", "get-url", "origin")).strip()
        except CommandFailed as error:
            raise NotUpdatable(
                f"{ROOT} is no git checkout with a remote named origin: {error}"
            ) from None
        return cls(ROOT, url)

    async def changes(self) -> list[str]:
        """The tracked files that differ from what is committed. Raises CommandFailed."""
        status = await _git(self.root, "status", "--porcelain", "--untracked-files=no")
        return [line[3:] for line in status.splitlines()]

    async def releases(self) -> list[Release]:
        """What the remote offers now. Raises CommandFailed if it does not answer."""
        return read_tags(await _git(self.root, "ls-remote", "--tags", "--", self.url))


@dataclass(slots=True)
class Progress:
    """What one neuron remembers of its updates: the release it runs (None: the checkout's own), the
    one that it will take, the one it has begun and not yet found good, with the state file that
    this one may have changed, and why others failed, by commit."""

    current: str | None = None
    wanted: str | None = None
    trying: str | None = None
    state: str | None = None
    failed: dict[str, str] = field(default_factory=dict)


class Installations:
    """The environments under `.releases` of a checkout, as the neuron `name` sees them."""

    def __init__(self, checkout: Checkout, name: str) -> None:
        self._checkout = checkout
        self._directory = checkout.root / DIRECTORY
        self._file = self._directory / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json"

    def load(self) -> Progress:
        """What this neuron has written down; nothing if that cannot be read."""
        try:
            with self._file.open("rb") as file:
                document = json.loads(file.read(MAX_STATE_BYTES))
            return Progress(
                current=_version_text(document["current"]),
                wanted=_version_text(document["wanted"]),
                trying=_version_text(document["trying"]),
                state=None if document["state"] is None else str(document["state"]),
                failed={str(k): str(v) for k, v in dict(document["failed"]).items()},
            )
        except (OSError, ValueError, KeyError, TypeError):
            return Progress()

    def save(self, progress: Progress) -> None:
        """Write it down, whole or not at all. Raises LocalError."""
        while len(progress.failed) > MAX_FAILED:
            del progress.failed[next(iter(progress.failed))]
        new = self._file.with_suffix(".new")
        try:
            self._directory.mkdir(exist_ok=True)
            with new.open("w") as file:
                json.dump(asdict(progress), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._file)
        except OSError as error:
            raise LocalError(f"cannot write {self._file}: {error.strerror}") from None

    def python(self, version: str) -> Path:
        """The interpreter of a release."""
        return self._directory / version / "venv" / "bin" / "python"

    async def works(self, version: str) -> bool:
        """Whether a release is installed and its interpreter still runs: an upgrade of the system's
        Python, say, leaves environments behind that do not."""
        if not (self._directory / version / "complete").exists():
            return False
        try:
            return await self._version_of(version) == version
        except CommandFailed:
            return False

    async def install(self, release: Release) -> None:
        """Installs a release, unless it is already, and has it check itself.

        Raises CommandFailed if it could not be fetched or installed, BadRelease if it is not good.
        Nothing is left of it then.
        """
        version = str(release.version)
        place = self._directory / version
        async with self._alone():
            if await self.works(version):
                if self._commit_of(version) == release.commit:
                    return
                if version in self._used(but=self._file):
                    raise CommandFailed(
                        f"{release.tag} has moved, and another neuron runs what it was before"
                    )
            _remove(place)
            try:
                await self._build(release, place)
                (place / "complete").write_text(release.commit)
            except BaseException:
                _remove(place)
                raise

    async def _build(self, release: Release, place: Path) -> None:
        source, python = place / "source", self.python(str(release.version))
        # A clone, not a worktree: nothing of this is written into the operator's repository.
        clone = ("clone", "--quiet", "--depth", "1", "--branch", release.tag)
        await _git(self._checkout.root, *clone, "--", self._checkout.url, str(source))
        commit = (await _git(source, "rev-parse", "HEAD")).strip()
        if commit != release.commit:
            raise CommandFailed(f"{release.tag} has moved to another commit meanwhile")
        await make_environment(source, place / "venv")
        _remove(source)
        told = await self._version_of(str(release.version))
        if told != str(release.version):
            raise BadRelease(f"the code of {release.tag} says that it is version {told}")
        try:
            await _run(
                "mapreduce.selfcheck", [str(python), "-m", "mapreduce.selfcheck"], CHECK_TIMEOUT_S
            )
        except CommandTimedOut:
            raise
        except CommandFailed as error:
            raise BadRelease(f"{release.tag} does not pass its own check: {error}") from None

    async def _version_of(self, version: str) -> str:
        show = "import mapreduce; print(mapreduce.__version__)"
        return (
            await _run(
                f"version {version}", [str(self.python(version)), "-c", show], CHECK_TIMEOUT_S
            )
        ).strip()

    async def prune(self) -> list[str]:
        """Removes what no neuron of this checkout runs or is about to; returns the versions."""
        gone = []
        async with self._alone():
            used = self._used()
            for place in sorted(self._directory.iterdir()):
                if place.is_dir() and place.name not in used:
                    await asyncio.to_thread(_remove, place)
                    gone.append(place.name)
        return gone

    def _used(self, but: Path | None = None) -> set[str | None]:
        """The releases that neurons of this checkout run or are about to, but for one's file."""
        used = set()
        for file in self._directory.glob("*.json"):
            if file != but:
                theirs = Installations(self._checkout, file.stem).load()
                used |= {theirs.current, theirs.wanted, theirs.trying}
        return used

    def _commit_of(self, version: str) -> str:
        """What an installed release was made from."""
        try:
            return (self._directory / version / "complete").read_text()
        except OSError:
            return ""

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Other neurons of this checkout wait here for each other."""
        try:
            self._directory.mkdir(exist_ok=True)
            lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CommandFailed(f"cannot write to {self._directory}: {error.strerror}") from None
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(LOCK_INTERVAL_S)
            yield
        finally:
            os.close(lock)


async def make_environment(source: Path, venv: Path) -> None:
    """A fresh environment with the package at `source`, and the dependencies it was tested with.
    Raises CommandFailed."""
    await _run("venv", [sys.executable, "-m", "venv", str(venv)], INSTALL_TIMEOUT_S)
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    pinned = ("-c", str(source / "constraints.txt"))
    await _run("pip", [str(venv / "bin" / "python"), *pip, *pinned, str(source)], INSTALL_TIMEOUT_S)


def environment_of_releases(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables for what runs in another Python environment than this process."""
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"}
    rest = {key: value for key, value in environ.items() if key not in ours}
    # The directory we are in may be a checkout, and hold another version of the package.
    return rest | {"PYTHONSAFEPATH": "1"}


async def _git(where: Path, *arguments: str, timeout_s: float = GIT_TIMEOUT_S) -> str:
    return await _run(f"git {arguments[0]}", ["git", "-C", str(where), *arguments], timeout_s)


async def _run(name: str, argv: Sequence[str], timeout_s: float) -> str:
    """What a command prints; raises CommandFailed."""
    env = environment_of_releases(os.environ)
    # Inside a git hook these name another repository; and nobody is here to type a password.
    env = {key: value for key, value in env.items() if key not in OF_A_HOOK}
    env |= {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    output = await run_command(
        name, argv, timeout_s=timeout_s, most_bytes=MAX_OUTPUT_BYTES, env=env
    )
    return output.decode(errors="replace")


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def _version_text(value: object) -> str | None:
    """A version from a file: it becomes a part of paths. Raises ValueError."""
    return None if value is None else str(Version.parse(str(value)))


def left_behind(name: str) -> Version | None:
    """The release that the neuron `name` ran last by itself, if that is newer than the running
    code; None otherwise."""
    current = Installations(Checkout(ROOT, ""), name).load().current
    newer = None if current is None else Version.parse(current)
    return newer if newer is not None and newer > own_version() else None


def own_version() -> Version:
    """The version of the running code."""
    return Version.parse(__version__)
