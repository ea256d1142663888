"""Runs a neuron as a child process, and changes it to newer releases.

The supervisor is the process that the operator started, and stays: it holds the socket that the
neuron listens on, so that nobody is refused while one release ends and the next begins. A release
is installed while the old one works; the old one finishes its jobs and ends; the new one must
become ready and stay, or the old one is started again, with its state as it was. Knows this order;
does not know git or pip (`releases.py`), nor how one speaks with a child (`child.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mapreduce.commands import CommandFailed
from mapreduce.core.releases import Release, newest, step_between
from mapreduce.core.versions import Version
from mapreduce.errors import LocalError
from mapreduce.net.listener import listen
from mapreduce.releases import (
    BadRelease,
    Checkout,
    Installations,
    environment_of_releases,
    own_version,
)
from mapreduce.services.child import Child, NotGood, Program
from mapreduce.services.worker import RESUME
from mapreduce.store.aside import let_go, put_back, set_aside

if TYPE_CHECKING:
    import socket

    from mapreduce.config import AxonConfig, UpdateConfig

READY_S: Final = 40.0  # with the old release started again, less than a minute for a broken one
PROBATION_S: Final = 30.0
DRAIN_S: Final = 600.0
DRAIN_AGAIN_S: Final = 3600.0
GIVEN_UP_S: Final = 3.0
FIRST_LOOK_S: Final = 60.0
KEEP_STATE: Final = ("validator", "all")  # neurons/: with a file that a release may convert
MAX_REASON: Final = 500

_log = logging.getLogger(__name__)


class Supervisor:
    """One neuron and its releases. `module` is what runs as `neurons.MODULE`; `listener` is the
    socket it listens on, None for a bot."""

    def __init__(
        self,
        checkout: Checkout,
        installed: Installations,
        updates: UpdateConfig,
        module: str,
        listener: socket.socket | None,
    ) -> None:
        self.exit_code = 0
        self._checkout = checkout
        self._installed = installed
        self._updates = updates
        self._module = module
        self._listener = listener
        self._own = Program(own_version(), (sys.executable, *sys.orig_argv[1:]), dict(os.environ))
        self._progress = installed.load()
        self._child: Child | None = None
        self._copied: Path | None = None  # a state whose copy is to go
        self._told: set[str] = set()

    async def run(self) -> None:
        """Runs the neuron until it ends by itself; stops it when cancelled. `exit_code` is what it
        ended with.

        Raises LocalError or OSError if it cannot be started.
        """
        try:
            child = self._start(await self._first_program())
            pause_s = min(FIRST_LOOK_S, self._updates.every_s)
            while True:
                release = await self._next_release(child, pause_s)
                if release is None:
                    return
                child, pause_s = await self._switch(child, release)
        finally:
            if self._child is not None:
                self.exit_code = await self._child.stop()

    def kill(self) -> None:
        """Ends the neuron at once."""
        if self._child is not None:
            self._child.kill()

    def _start(self, program: Program) -> Child:
        self._child = Child.start(program, self._module, self._listener)
        return self._child

    # Which release --------------------------------------------------------------------------------

    async def _first_program(self) -> Program:
        """What ran last, if it still can; else the checkout's own version."""
        progress = self._progress
        if progress.trying is not None:
            _log.warning("an update was interrupted", extra={"version": progress.trying})
            await self._undo()
        if progress.current is None:
            return self._own
        version = Version.parse(progress.current)
        if version > self._own.version:
            if await self._installed.works(progress.current):
                return self._program(version)
            _log.warning("this release does not run here any more", extra={"version": version})
        return self._own

    def _program(self, version: Version) -> Program:
        python = str(self._installed.python(str(version)))
        argv = (python, "-m", f"neurons.{self._module}", *sys.argv[1:])
        return Program(version, argv, environment_of_releases(os.environ))

    async def _next_release(self, child: Child, pause_s: float) -> Release | None:
        """The release to take next, installed; None if the child ends before there is one."""
        search = asyncio.create_task(self._search(child, pause_s))
        try:
            await asyncio.wait([search, child.ended], return_when=asyncio.FIRST_COMPLETED)
            return None if child.ended.done() else search.result()
        finally:
            search.cancel()  # with the installation that it may be in
            await asyncio.wait([search])

    async def _search(self, child: Child, pause_s: float) -> Release:
        """Looks for a release to take, from time to time, until one is there and installed."""
        pause_s *= random.random()
        while True:
            await asyncio.sleep(pause_s)
            try:
                if self._copied is not None:
                    await self._finish()
                release = await self._look(child.running)
            except (CommandFailed, LocalError) as error:
                _log.warning("no update", extra={"error": str(error)})
            except Exception:  # the top of this task: what runs must not end for it
                _log.exception("no update")
            else:
                if release is not None:
                    return release
            pause_s = self._updates.every_s * random.uniform(0.75, 1.25)

    async def _look(self, running: Version) -> Release | None:
        """A release that is installed and to be taken now.

        Raises CommandFailed or LocalError if that cannot be found out, or not be installed.
        """
        changes = await self._checkout.changes()
        if changes:
            self._tell_once(
                f"{self._checkout.root} has changes that are not committed: nothing is updated",
                files=changes[:8],
            )
            return None
        release = await self._offered(running)
        if release is None:
            return None
        if not await self._installed.works(str(release.version)):
            delay_s = random.uniform(0, self._updates.delay_s)
            _log.info("a newer release", extra={"version": release.tag, "in_s": round(delay_s)})
            await asyncio.sleep(delay_s)
            release = await self._offered(running)  # there may be another one by now, or none
            if release is None:
                return None
            _log.info("installing", extra={"version": release.tag})
        self._progress.wanted = str(release.version)  # so that nobody removes it meanwhile
        self._installed.save(self._progress)
        try:
            await self._installed.install(release)
        except BadRelease as error:
            self._give_up(release, str(error))
            return None
        return release

    async def _offered(self, running: Version) -> Release | None:
        """The newest release that may be taken; tells, once each, of those that may not."""
        level = self._updates.level
        releases = await self._checkout.releases()
        largest = newest(releases, running, "major")
        assert level != "no"  # then there is no supervisor
        if level == "notify":
            if largest is not None:
                self._tell_once("a newer release", version=largest.tag, running=running)
            return None
        release = newest(releases, running, level, self._progress.failed)
        if largest is not None and largest != release:
            failed = self._progress.failed.get(largest.commit)
            step = step_between(running, largest.version)
            why = failed or f"a {step} release, and auto_update is {level}"
            self._tell_once("a newer release is not taken", version=largest.tag, why=why)
        return release

    def _tell_once(self, message: str, **facts: object) -> None:
        text = f"{message} {facts}"
        if text not in self._told:
            self._told.add(text)
            _log.warning(message, extra=facts)

    def _give_up(self, release: Release, reason: str) -> None:
        self._progress.wanted = None
        self._progress.failed[release.commit] = reason[:MAX_REASON]
        self._save()
        _log.error(
            "a release is not good, and is not tried again",
            extra={"version": release.tag, "reason": reason},
        )

    # Changing to it -------------------------------------------------------------------------------

    async def _switch(self, old: Child, release: Release) -> tuple[Child, float]:
        """Ends the old release and starts the new one, or the old one again if it is not good.

        Returns the child that runs now, and the seconds until releases are looked for again.
        """
        # One that never became ready has nothing under way.
        if not old.ready.is_set() and self._module in KEEP_STATE:
            # It has not said yet which file is to be copied.
            return old, min(FIRST_LOOK_S, self._updates.every_s)
        if old.ready.is_set() and not await old.wait_drained(DRAIN_S):
            old.tell(RESUME)
            _log.warning(
                "an update waits for work that is under way; a restart takes it at once",
                extra={"version": release.tag, "work": old.work, "again_in_s": DRAIN_AGAIN_S},
            )
            return old, DRAIN_AGAIN_S
        version = str(release.version)
        self._progress.trying = version
        self._progress.state = None if old.state is None else str(old.state)
        # A copy that an earlier update has left must never be taken for this one's.
        if not self._forget_copy(old.state) or not self._save():
            old.tell(RESUME)
            self._progress.trying = self._progress.state = None
            return old, DRAIN_AGAIN_S
        _log.info("updating", extra={"from": old.program.version, "to": release.version})
        await old.stop()
        try:
            if old.state is not None:
                await asyncio.to_thread(set_aside, old.state)
            new = self._start(self._program(release.version))
        except (LocalError, OSError) as error:  # a full disk, say: no fault of the release
            return await self._go_back(old.program, str(error), blamed=None), DRAIN_AGAIN_S
        try:
            await new.wait_ready(READY_S)
            await new.wait_proven(PROBATION_S)
        except NotGood as error:
            back = await self._go_back(old.program, str(error), blamed=release)
            return back, self._updates.every_s
        self._progress.current = version
        self._progress.wanted = self._progress.trying = self._progress.state = None
        self._copied = old.state
        _log.info("updated", extra={"version": version, "removed": await self._finish()})
        return new, self._updates.every_s

    async def _go_back(self, program: Program, reason: str, *, blamed: Release | None) -> Child:
        """Starts the old program again, with the state that it left. The release that is `blamed`
        is not tried again, if the old one works here and now."""
        _log.error("an update failed: the old release is started again", extra={"reason": reason})
        if self._child is not None:
            await self._child.stop(GIVEN_UP_S)  # it serves nobody
        await self._undo()
        back = self._start(program)
        try:
            await back.wait_ready(READY_S)
        except NotGood as error:
            # Then it may have been the chain, or this machine, and no fault of the release.
            _log.error("the old release does not start either", extra={"reason": str(error)})
        else:
            if blamed is not None:
                self._give_up(blamed, reason)
            _log.info(
                "rolled back", extra={"version": program.version, "removed": await self._prune()}
            )
        return back

    async def _undo(self) -> None:
        """What the release that was tried has left behind goes."""
        progress = self._progress
        if progress.state is not None:
            try:
                await asyncio.to_thread(put_back, Path(progress.state))
            except LocalError as error:
                _log.error("the state is not as it was", extra={"error": str(error)})
                return  # the next start tries again
        progress.trying = progress.state = None
        self._save()

    async def _finish(self) -> list[str]:
        """Removes what an update has left, once it is written down that it is over; returns the
        releases that are gone. The copy of the state stays while the disk is full, say."""
        if not self._save() or not self._forget_copy(self._copied):
            return []
        self._copied = None
        return await self._prune()

    def _forget_copy(self, state: Path | None) -> bool:
        """Whether there is no copy of a state any more."""
        try:
            if state is not None:
                let_go(state)
        except LocalError as error:
            _log.error("an update is put off", extra={"error": str(error)})
            return False
        return True

    async def _prune(self) -> list[str]:
        """The environments that are removed; one that cannot be is told of, and stays."""
        try:
            return await self._installed.prune()
        except (CommandFailed, OSError) as error:
            _log.warning("old releases are not removed", extra={"error": str(error)})
            return []

    def _save(self) -> bool:
        """Whether what is remembered could be written down: a full disk must end nothing."""
        try:
            self._installed.save(self._progress)
        except LocalError as error:
            _log.error("updates are not written down", extra={"error": str(error)})
            return False
        return True


def supervise(updates: UpdateConfig, name: str, module: str, axon: AxonConfig | None) -> int:
    """Runs a neuron, `neurons.MODULE` with this process's arguments, until it ends or this process
    is told to; returns its exit code. `name` tells the neurons of a machine apart.

    Raises NotUpdatable before anything has begun, or LocalError.
    """
    return asyncio.run(_supervise(updates, name, module, axon))


async def _supervise(updates: UpdateConfig, name: str, module: str, axon: AxonConfig | None) -> int:
    checkout = await Checkout.find()
    listener = None if axon is None else listen(axon.ip, axon.port)
    supervisor = Supervisor(checkout, Installations(checkout, name), updates, module, listener)
    running = asyncio.create_task(supervisor.run())

    def stop() -> None:
        if running.cancelling():  # the second time
            supervisor.kill()
        else:
            running.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    with contextlib.suppress(asyncio.CancelledError):
        await running
    code = supervisor.exit_code
    return code if code >= 0 else 128 - code
