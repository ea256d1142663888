"""Set-up of logging for our processes: what is shown, where, and in which form.

One line per record: UTC time, level, logger, message, then the facts of `extra` as key=value. Knows
the loggers `mapreduce` and `bittensor`; a program that embeds us and never calls
`configure_logging` keeps its own set-up.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import re
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mapreduce.errors import ConfigError

if TYPE_CHECKING:
    from mapreduce.config import LoggingConfig

TRACE = 5
LOGGERS = ("mapreduce", "bittensor")
FILE_BYTES = 10 * 2**20
FILE_COUNT = 5  # old files kept beside the current one
COMPLAINT_INTERVAL_S = 60.0

_LEVELS = {"info": logging.INFO, "debug": logging.DEBUG, "trace": TRACE}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = re.compile(r"[^\s\"'=\\]+")


def configure_logging(config: LoggingConfig, *, name: str) -> None:
    """Log to stderr and, with a `logging_dir`, to the rotating file `<logging_dir>/<name>.log`.

    `name` tells the processes of a machine apart: two that share a file would rotate it under each
    other. Calling again replaces what the last call set up.

    Raises:
        ConfigError: the directory or the file cannot be made or written.
    """
    logging.addLevelName(TRACE, "TRACE")
    handlers: list[logging.Handler] = [_StderrHandler()]
    if config.logging_dir is not None:
        directory = config.logging_dir.expanduser()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handlers.append(_FileHandler(directory / f"{name}.log"))
        except OSError as error:
            raise ConfigError(
                f"logging.logging_dir = {str(config.logging_dir)!r} cannot be used: "
                f"{error.strerror}: {error.filename}"
            ) from None
    for handler in handlers:
        handler.setFormatter(LineFormatter())
    for logger in map(logging.getLogger, LOGGERS):
        for old in [h for h in logger.handlers if isinstance(h, _Patient)]:
            logger.removeHandler(old)
            old.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(_LEVELS[config.level])


class LineFormatter(logging.Formatter):
    """`2024-05-01T12:00:00.123Z INFO    mapreduce.net: message step=7 bytes=1048576`."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        facts = [
            f"{key}={_fact(value)}"
            for key, value in vars(record).items()
            if key not in _STANDARD and not key.startswith("_")
        ]
        # A text from another party must not be able to forge a line of its own.
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in record.getMessage())
        head = f"{when.removesuffix('+00:00')}Z {record.levelname:<7} {record.name}: {message}"
        line = " ".join([head, *facts])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            line += "\n" + self.formatStack(record.stack_info)
        return line


def _fact(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else json.dumps(text)


class _Patient(logging.Handler):
    """Failures (a full disk, a closed stderr) neither stop the process nor flood its stderr."""

    _complained_s = float("-inf")

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a wrong call of ours: show it where it was made
            super().handleError(record)
            return
        if time.monotonic() - self._complained_s >= COMPLAINT_INTERVAL_S:
            self._complained_s = time.monotonic()
            with contextlib.suppress(OSError, ValueError):  # stderr may be gone as well
                print(f"error: a log message was lost: {error}", file=sys.stderr)


class _StderrHandler(_Patient, logging.StreamHandler):  # type: ignore[type-arg]
    """To stderr as it is when the handler is made."""


class _FileHandler(_Patient, logging.handlers.RotatingFileHandler):
    """To a file that is renamed and begun anew when it is full."""

    def __init__(self, path: object) -> None:
        super().__init__(str(path), maxBytes=FILE_BYTES, backupCount=FILE_COUNT, encoding="utf-8")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: what is still buffered cannot be saved
            super().close()
