"""Logging: levels, the form of a line, the file, and a full disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from mapreduce.config import LoggingConfig
from mapreduce.errors import ConfigError
from mapreduce.logs import LOGGERS, TRACE, configure_logging

log = logging.getLogger("mapreduce.test")


@pytest.fixture(autouse=True)
def _restore_loggers():
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.mark.parametrize(("level", "shown"), [("info", 1), ("debug", 2), ("trace", 3)])
def test_levels(level, shown, capsys):
    configure_logging(LoggingConfig(level=level), name="miner")
    for number in (logging.INFO, logging.DEBUG, TRACE):
        log.log(number, "hello")
    assert len(capsys.readouterr().err.splitlines()) == shown


def test_a_line_has_time_level_logger_message_and_facts(capsys):
    configure_logging(LoggingConfig(), name="miner")
    log.info("segment %s", "reduced", extra={"step": 7, "seconds": 0.25, "who": 'a "b"\nc'})
    (line,) = capsys.readouterr().err.splitlines()
    time, rest = line.split(" ", 1)
    assert time.endswith("Z")
    assert time[10] == "T"
    assert rest == (r'INFO    mapreduce.test: segment reduced step=7 seconds=0.25 who="a \"b\"\nc"')


def test_a_message_cannot_forge_a_line(capsys):
    configure_logging(LoggingConfig(), name="miner")
    log.info("peer said %s", "x\n2030-01-01 ERROR forged\x1b[31m")
    (line,) = capsys.readouterr().err.splitlines()
    assert r"x\n2030-01-01 ERROR forged\x1b[31m" in line


def test_a_traceback_is_shown(capsys):
    configure_logging(LoggingConfig(), name="miner")
    try:
        raise KeyError("lost")
    except KeyError:
        log.exception("failed", extra={"step": 1})
    err = capsys.readouterr().err
    assert "failed step=1\nTraceback" in err
    assert "KeyError: 'lost'" in err


def test_the_sdk_is_shown_too_and_the_file_holds_the_same(tmp_path, capsys):
    directory = tmp_path / "logs" / "new"
    configure_logging(LoggingConfig(logging_dir=directory), name="miner")
    logging.getLogger("bittensor.client").warning("slow node")
    logging.getLogger("somebody.else").warning("not ours")
    err = capsys.readouterr().err
    assert "bittensor.client: slow node" in err
    assert (directory / "miner.log").read_text() in err


def test_a_second_call_replaces_the_first(tmp_path, capsys):
    for _ in range(2):
        configure_logging(LoggingConfig(logging_dir=tmp_path), name="miner")
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "miner.log").read_text().count("once") == 1


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"logging\.logging_dir = .*file/logs"):
        configure_logging(LoggingConfig(logging_dir=tmp_path / "file" / "logs"), name="miner")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_costs_one_complaint_and_no_process(tmp_path, capsys):
    os.symlink("/dev/full", tmp_path / "miner.log")
    configure_logging(LoggingConfig(logging_dir=tmp_path), name="miner")
    for number in range(3):
        log.info("record %s", number)
    err = capsys.readouterr().err
    assert [f"record {n}" in err for n in range(3)] == [True] * 3
    assert err.count("a log message was lost") == 1
    assert "No space left" in err
