"""Versions: one source, one order, one rule for who works with whom."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from mapreduce import __version__
from mapreduce.core.versions import MAX_CLAIM, Version, disagreement

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("text", ["0.0.0", "2.0.0", "2.10.3", "999999.0.1"])
def test_a_version_is_written_as_it_is_read(text):
    assert str(Version.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "2.0", "2.0.0.0", "v2.0.0", "2.0.0-rc1", " 2.0.0", "2.0.0\n", "02.0.0"),
        *("2.-1.0", "2.0.٣", "1000000.0.0", "2..0", "../../etc"),
    ],
)
def test_anything_else_is_none(text):
    with pytest.raises(ValueError, match="no version"):
        Version.parse(text)


def test_versions_are_ordered_by_number_and_not_by_letter():
    texts = ["1.9.9", "2.0.0", "2.0.9", "2.0.10", "2.1.0", "10.0.0"]
    versions = [Version.parse(text) for text in texts]
    assert all(older < newer for older, newer in pairwise(versions))


@pytest.mark.parametrize("theirs", ["2.0.0", "2.9.1", "2.0.0-local", "2"])
def test_the_same_first_number_works_together(theirs):
    assert disagreement(theirs, "2.0.0", "the caller") is None


@pytest.mark.parametrize(
    ("theirs", "update"),
    [("1.9.9", "the caller"), ("3.0.0", "this side"), ("20.0.0", "this side")],
)
def test_another_one_is_told_with_both_and_who_has_to_change(theirs, update):
    said = str(disagreement(theirs, "2.0.0", "the caller"))
    assert f"the caller speaks version {theirs}, this side 2.0.0" in said
    assert said.endswith(f"update {update}")


@pytest.mark.parametrize("theirs", [None, "", "x" * 10_000, "3\x1b[2J\n.0", "٢.0.0"])
def test_what_a_stranger_claims_is_bounded_and_printable(theirs):
    said = str(disagreement(theirs, "2.0.0", "the caller"))
    assert said.isprintable()
    assert len(said) < MAX_CLAIM + 200
    assert said.endswith("update the older one")


# One source.


def test_the_version_is_one_and_the_changelog_begins_with_it():
    Version.parse(__version__)
    assert "__version__" in (ROOT / "setup.py").read_text()
    first = re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert first is not None
    assert first[1] == __version__


def test_no_other_file_of_the_package_writes_it_down():
    said = re.escape(__version__)
    for path in [*(ROOT / "mapreduce").rglob("*.py"), ROOT / "setup.py"]:
        if path.name == "__init__.py" and path.parent.name == "mapreduce":
            continue
        assert not re.search(rf'["\']{said}["\']', path.read_text()), path
