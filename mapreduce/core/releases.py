"""Which release a neuron may take: the tags of a repository, and the largest step it was allowed.

Knows what git lists and how versions compare; knows neither git nor what installing is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mapreduce.core.versions import Version

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

Step = Literal["major", "minor", "patch"]

_LINE = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})\trefs/tags/v(.{1,32}?)(\^\{\})?")


@dataclass(frozen=True, slots=True, order=True)
class Release:
    """A tag `vX.Y.Z`, and the commit that it names."""

    version: Version
    commit: str

    @property
    def tag(self) -> str:
        """The name of the tag."""
        return f"v{self.version}"


def read_tags(listing: str) -> list[Release]:
    """The releases in what `git ls-remote --tags` prints, in order; other tags are no releases.

    An annotated tag is listed twice, and the second line, which ends in `^{}`, has the commit.
    """
    commits: dict[Version, str] = {}
    for line in listing.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        try:
            version = Version.parse(match[2])
        except ValueError:
            continue
        if match[3] or version not in commits:
            commits[version] = match[1]
    return sorted(Release(version, commit) for version, commit in commits.items())


def step_between(older: Version, newer: Version) -> Step:
    """How large the step from one version to a newer one is."""
    if newer.major != older.major:
        return "major"
    return "minor" if newer.minor != older.minor else "patch"


def newest(
    releases: Iterable[Release], running: Version, largest: Step, failed: Collection[str] = ()
) -> Release | None:
    """The newest release above `running` by at most the step `largest` whose commit has not
    `failed`; None if there is none."""
    sizes: tuple[Step, ...] = ("patch", "minor", "major")
    allowed = sizes[: sizes.index(largest) + 1]
    return max(
        (
            release
            for release in releases
            if release.version > running
            and step_between(running, release.version) in allowed
            and release.commit not in failed
        ),
        default=None,
    )
