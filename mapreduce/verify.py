"""`python -m mapreduce.verify`: checks fraud proofs offline and prints who lied, and how.

Knows how a finding reads. Needs no chain and no network, so it does not know whether the validator
named in a proof is one of the subnet's; what a proof proves is decided in `wire/proofs.py`.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mapreduce.config import run_cli
from mapreduce.errors import BadMessage
from mapreduce.net.auth import verify_signature
from mapreduce.wire.proofs import MAX_PROOF_BYTES, ProofInvalid, check_proof

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mapreduce.wire.messages import Grant
    from mapreduce.wire.proofs import Finding

EPILOG = """\
Every proof holds or proves nothing, whoever has sent it: the signatures in it are checked and the
blocks computed again, on this machine and without any network. What it cannot show is whether the
hotkey that signed its grant is a validator of your subnet: look that one up.

Exit code: 0 if every proof holds, 1 if one does not, 2 if a file cannot be read.
"""


def load_proof(path: str) -> tuple[Grant, Finding]:
    """What the file proves, and in which job. Raises OSError, or BadMessage: it proves nothing."""
    with open(path, "rb") as file:
        data = file.read(MAX_PROOF_BYTES + 1)
    if len(data) > MAX_PROOF_BYTES:
        raise ProofInvalid(f"a proof has at most {MAX_PROOF_BYTES} bytes, this file has more")
    return check_proof(data, verify_signature)


def report_lines(path: str, grant: Grant, finding: Finding) -> list[str]:
    """A proof that holds, for people."""
    return [
        f"PROVEN   {path}",
        f"  kind   {finding.kind.label}",
        f"  who    {finding.lines[0]}",
        f"  what   {finding.what}",
        f"  where  job {grant.job}, step {finding.step}, segment {finding.segment}",
        f"  grant  made by validator {grant.validator} of netuid {grant.netuid}, "
        f"{_utc(grant.created_at)}",
    ]


def report_fields(path: str, grant: Grant, finding: Finding) -> dict[str, Any]:
    """A proof that holds, for programs."""
    return {
        "path": path,
        "valid": True,
        "kind": finding.kind.label,
        "culprit": finding.culprit,
        "uid": finding.uid,
        "rank": None if finding.rank is None else finding.rank + 1,
        "job": grant.job,
        "step": finding.step,
        "segment": finding.segment,
        "validator": grant.validator,
        "what": finding.what,
    }


def _utc(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):  # whoever signs a grant may write any number
        return f"at {seconds!r} s of the Unix epoch"


def _printable(text: str) -> str:
    # A reason may quote the file, and a file from a stranger must not drive the terminal.
    return "".join(char if char.isprintable() else "?" for char in text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mapreduce.verify",
        description="Checks fraud proofs and prints who lied, about what, and in which bytes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("proofs", metavar="PROOF", nargs="+", help="file of a fraud proof")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of text")
    options = parser.parse_args(argv)
    fields: list[dict[str, Any]] = []
    for path in options.proofs:
        try:
            grant, finding = load_proof(path)
        except OSError as error:
            parser.error(f"{path}: {error.strerror}")
        except BadMessage as error:
            reason = _printable(str(error))
            fields.append({"path": path, "valid": False, "reason": reason})
            lines = [f"INVALID  {path}: {reason}"]
        else:
            fields.append(report_fields(path, grant, finding))
            lines = report_lines(path, grant, finding)
        if not options.json:
            print("\n".join(lines), flush=True)
    if options.json:
        print(json.dumps(fields, indent=2))
    return 0 if all(entry["valid"] for entry in fields) else 1


if __name__ == "__main__":
    run_cli(main)
