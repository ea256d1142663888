"""`python -m mapreduce.verify`: what people and programs get to read of a proof."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mapreduce.verify import main
from mapreduce.wire.proofs import MAX_PROOF_BYTES
from test.unit.test_proofs import Scene

if TYPE_CHECKING:
    from pathlib import Path

    from mapreduce.wire.proofs import Claim


def written(path: Path, scene: Scene, claim: Claim) -> str:
    path.write_bytes(scene.proof(claim))
    return str(path)


def test_a_proof_against_a_miner_says_who_what_and_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Scene(1)
    block, output = scene.one_bit_off()
    path = written(tmp_path / "sum", scene, scene.wrong_sum(block, output))
    assert main([path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"PROVEN   {path}",
        "  kind   F1 wrong sum",
        f"  who    miner uid {10 + scene.segment}, hotkey {scene.miner.ss58_address}",
    ]
    assert f"elements of block {block} are wrong" in lines[3]
    grant = scene.parties.grant
    assert lines[4:] == [
        f"  where  job {grant.job}, step {scene.step}, segment {scene.segment}",
        f"  grant  made by validator {grant.validator} of netuid 10, 1970-01-01 00:16:40 UTC",
    ]


def test_one_that_does_not_hold_is_named_among_those_that_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Scene(2)
    claim = scene.two_uploads(scene.delegation(), root=bytes(32))
    good, bad = written(tmp_path / "good", scene, claim), tmp_path / "bad"
    bad.write_bytes(scene.proof(claim)[:-1])
    assert main([str(bad), good]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"INVALID  {bad}: it ends after ")
    assert lines[1] == f"PROVEN   {good}"
    peer = scene.parties.peers[scene.rank].ss58_address
    assert lines[3] == f"  who    rank {scene.rank + 1}, hotkey {peer}"


def test_programs_get_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = Scene(3)
    uploads = scene.two_uploads(None, root=bytes(32))
    first = written(tmp_path / "uploads", scene, uploads)
    second = written(tmp_path / "receipt", scene, scene.broken_receipt(root=bytes(32)))
    bad = tmp_path / "bad"
    bad.write_bytes(b"nothing of ours")
    assert main(["--json", first, second]) == 0
    assert [entry["valid"] for entry in json.loads(capsys.readouterr().out)] == [True, True]
    assert main(["--json", first, second, str(bad)]) == 1
    peer, miner, nothing = json.loads(capsys.readouterr().out)
    assert peer == {
        "path": first,
        "valid": True,
        "kind": "F4 two uploads",
        "culprit": scene.parties.sessions[scene.rank].ss58_address,
        "uid": None,
        "rank": scene.rank + 1,
        "job": scene.parties.grant.job,
        "step": scene.step,
        "segment": scene.segment,
        "validator": scene.parties.grant.validator,
        "what": peer["what"],
    }
    assert (miner["kind"], miner["uid"], miner["rank"]) == (
        "F2 broken receipt",
        10 + scene.segment,
        None,
    )
    reason = "it ends after 15 bytes, in the middle"
    assert nothing == {"path": str(bad), "valid": False, "reason": reason}


def test_a_file_that_is_too_large_is_no_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(1 << 40)  # sparse: nobody could read it into memory
    assert main([str(huge)]) == 1
    assert f"at most {MAX_PROOF_BYTES} bytes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_cannot_be_read_is_wrong_use(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main([str(tmp_path / name)])
    assert exited.value.code == 2
    assert str(tmp_path / name) in capsys.readouterr().err


def test_a_file_cannot_drive_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Scene(4)
    data = scene.proof(scene.two_uploads(scene.delegation(), root=bytes(32)))
    address = scene.delegation().hotkey.encode()
    bad = tmp_path / "bad"
    bad.write_bytes(data.replace(address, b"\x1b[2J" + address[4:]))
    assert main([str(bad)]) == 1
    assert "?[2J" in capsys.readouterr().out


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    scene = Scene(5)
    path = written(tmp_path / "proof", scene, scene.two_certificates(root=bytes(32)))
    command = [sys.executable, "-m", "mapreduce.verify", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"PROVEN   {path}\n  kind   F3 two certificates\n")
    assert done.stderr == ""
