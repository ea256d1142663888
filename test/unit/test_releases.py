"""Which release a neuron may take, and what it remembers of updates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from mapreduce.core.releases import Release, newest, read_tags, step_between
from mapreduce.core.versions import Version
from mapreduce.releases import MAX_FAILED, Checkout, Installations, Progress

if TYPE_CHECKING:
    from pathlib import Path

A, B, C, D = (digit * 40 for digit in "abcd")
LISTING = f"""\
{A}\trefs/tags/v2.0.0
{B}\trefs/tags/v2.0.1
{C}\trefs/tags/v2.0.1^{{}}
{D}\trefs/tags/v2.0.2-rc1
{D}\trefs/tags/2.0.3
{D}\trefs/tags/v2.0
{D}\trefs/tags/v02.0.4
{D}\trefs/heads/v2.0.5
{D}\trefs/tags/../../v2.0.6
short\trefs/tags/v2.0.7
{D}\trefs/tags/v3.0.0
"""


def release(text: str, commit: str = A) -> Release:
    return Release(Version.parse(text), commit)


RELEASES = [release(text) for text in ("1.9.9", "2.0.0", "2.0.1", "2.0.10", "2.1.0", "3.0.0")]


def test_only_tags_of_releases_count_and_annotated_ones_name_their_commit():
    assert read_tags(LISTING) == [release("2.0.0"), release("2.0.1", C), release("3.0.0", D)]
    assert read_tags("") == read_tags("warning: \n\t\n") == []


def test_the_order_of_the_two_lines_of_a_tag_does_not_matter():
    assert read_tags("\n".join(reversed(LISTING.splitlines()))) == read_tags(LISTING)


@pytest.mark.parametrize(
    ("running", "largest", "expected"),
    [
        ("2.0.0", "patch", "2.0.10"),
        ("2.0.0", "minor", "2.1.0"),
        ("2.0.0", "major", "3.0.0"),
        ("2.0.10", "patch", None),
        ("1.9.0", "patch", "1.9.9"),
        ("1.9.9", "minor", None),
        ("2.1.0", "minor", None),
        ("3.0.0", "major", None),
        ("3.0.1", "major", None),  # never back
    ],
)
def test_the_newest_that_the_level_allows(running, largest, expected):
    found = newest(RELEASES, Version.parse(running), largest)
    assert (None if found is None else str(found.version)) == expected


def test_a_release_that_failed_is_passed_over_until_its_tag_moves():
    offered = [release("2.0.1", A), release("2.0.2", B)]
    assert newest(offered, Version(2, 0, 0), "patch", {B}) == offered[0]
    assert newest(offered, Version(2, 0, 0), "patch", {A, B}) is None
    moved = [release("2.0.2", C)]
    assert newest(moved, Version(2, 0, 0), "patch", {A, B}) == moved[0]


def test_steps():
    old = Version(2, 3, 4)
    assert step_between(old, Version(2, 3, 5)) == "patch"
    assert step_between(old, Version(2, 4, 0)) == "minor"
    assert step_between(old, Version(3, 0, 0)) == "major"


# What is remembered.


def installations(tmp_path: Path, name: str = "miner-w-h") -> Installations:
    return Installations(Checkout(tmp_path, "unused"), name)


def test_progress_is_kept(tmp_path):
    progress = Progress("2.0.1", "2.0.2", "2.0.2", "/state", {A: "died"})
    installations(tmp_path).save(progress)
    assert installations(tmp_path).load() == progress
    assert installations(tmp_path, "another").load() == Progress()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        '{"current": "../../etc", "wanted": null, "trying": null, "state": null, "failed": {}}',
        '{"current": null, "wanted": null, "trying": 5, "state": null, "failed": {}}',
        '{"current": null, "wanted": null, "trying": null, "state": null, "failed": 3}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(tmp_path, content):
    kept = installations(tmp_path)
    kept.save(Progress(current="2.0.1"))
    (file,) = (tmp_path / ".releases").glob("*.json")
    file.write_text(content)
    assert kept.load() == Progress()


def test_the_list_of_failed_releases_is_bounded(tmp_path):
    kept = installations(tmp_path)
    kept.save(Progress(failed={f"{number:040x}": "bad" for number in range(MAX_FAILED + 9)}))
    failed = kept.load().failed
    assert len(failed) == MAX_FAILED
    assert f"{MAX_FAILED + 8:040x}" in failed  # the oldest went


def test_a_name_makes_one_file_in_the_directory(tmp_path):
    installations(tmp_path, "all-../../x-hot key").save(Progress())
    (file,) = (tmp_path / ".releases").iterdir()
    assert json.loads(file.read_text())["current"] is None
