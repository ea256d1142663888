"""How often each miner is chosen for a job."""

from __future__ import annotations

from typing import Any

import pytest

from mapreduce.services.recruiter import Recruiter
from mapreduce.wire.messages import MinerAddress


def test_the_scores_decide_all_but_a_twentieth_of_the_choice() -> None:
    nothing: Any = None
    recruiter = Recruiter(nothing, nothing, nothing, dict)
    able = [MinerAddress(uid=i, hotkey=f"m{i}", ip="1.2.3.4", port=1) for i in range(2)]
    assert recruiter._chances(able) == [1.0, 1.0]
    recruiter.weights = {"m0": 0.5, "elsewhere": 0.5}
    assert recruiter._chances(able) == pytest.approx([0.975, 0.025])
