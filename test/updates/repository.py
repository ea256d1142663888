"""Makes releases of the code that is under test, good ones and broken ones, as git tags.

Knows git and which line to change for what; knows nothing of how an update goes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = (
    "-c",
    "user.name=Test",
    "-c",
    "user.email=test@example.org",
    "-c",
    "commit.gpgsign=false",
)


def git(where: Path, *arguments: str) -> str:
    """Runs git there; returns what it prints."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", *IDENTITY, *arguments],
        cwd=where,
        env=env,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


class Repository:
    """The origin at `path`: the working tree as it is, and the releases made of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # not one that was just removed
                target = path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        git(path, "init", "--quiet", "--initial-branch", "main")
        self._commit("The working tree")

    def clone(self, path: Path) -> Path:
        """An operator's checkout."""
        git(self.path.parent, "clone", "--quiet", str(self.path), str(path))
        return path

    def release(self, version: str, *changes: tuple[str, str, str]) -> str:
        """Tags the present code with this version and these changes (file, old text, new text),
        which later releases do not have; returns the commit."""
        package = self.path / "mapreduce" / "__init__.py"
        text, count = re.subn(
            r'__version__ = "[^"]+"', f'__version__ = "{version}"', package.read_text()
        )
        assert count == 1
        package.write_text(text)
        before: dict[Path, str] = {}
        for name, old, new in changes:
            file = self.path / name
            before[file] = file.read_text()
            assert before[file].count(old) == 1, f"{old!r} stands in {name} not once"
            file.write_text(before[file].replace(old, new))
        self._commit(f"Release {version}")
        git(self.path, "tag", "--annotate", "--message", version, f"v{version}")
        commit = git(self.path, "rev-parse", "HEAD").strip()
        for file, content in before.items():
            file.write_text(content)
        if before:
            self._commit("Taken back")
        return commit

    def _commit(self, message: str) -> None:
        git(self.path, "add", "--all")
        git(self.path, "commit", "--quiet", "--message", message)
