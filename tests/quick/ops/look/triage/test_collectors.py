# SPDX-License-Identifier: Apache-2.0
"""The same diagnosis whatever a launcher, a cluster or a collector of logs put before each line."""

import json
from pathlib import Path

import pytest

from stages.ops.look.triage.case import open_case
from stages.ops.look.triage.diagnosis import diagnose
from stages.ops.look.triage.failure_rules import read_rules

RULES = read_rules()
PREFIXES = {
    "none": "",
    "journald": "Aug 17 18:42:18 node1 vllm[8052]: ",
    "job and actor": "[2026-08-17T16:24:02+08:00] job-ab12 >> (Engine pid=3111) ",
    "pdsh": "node-1: ",
    "mpirun": "[1,0]<stderr>:",
    "GitHub": "2026-08-17T16:24:02.1234567Z ",
    "stern": "train-0-abcde > train | ",
    "containerd": "2026-08-17T16:24:02.123456789Z stderr F ",
    "compose": "dump-1  | ",
    "ts": "[2026-08-17 16:24:02] ",
    "srun": "3: ",
    "Ray": "\x1b[36m(RayTrainWorker pid=1)\x1b[0m ",
    "seconds": "[  12.3s] ",
    "zone": "2026-08-17 16:24:02.000 CET ",
}
KNOWN = """\
INFO 11-02 09:14:01 [api_server.py:1] vLLM API server
ERROR 11-02 09:14:33 [core.py:866] Traceback (most recent call last):
ERROR 11-02 09:14:33 [core.py:866]   File "/usr/lib/vllm/core.py", line 8, in f
ERROR 11-02 09:14:33 [core.py:866]     raise ValueError("no CUDA out of memory")
ERROR 11-02 09:14:33 [core.py:866] ValueError: No available memory for the cache blocks.
Traceback (most recent call last):
  File "/usr/bin/vllm", line 10, in <module>
    main()
RuntimeError: Engine core initialization failed. See root cause above.
"""
UNKNOWN = """\
INFO 11-02 09:14:01 [a.py:1] start
Traceback (most recent call last):
  File "/w/train.py", line 10, in <module>
    raise FooError("CUDA out of memory")
FooError: something that no rule knows
"""
CLEAN = """\
INFO 11-02 09:14:01 [a.py:1] Received request x: prompt: 'RuntimeError: CUDA out of memory'
INFO 11-02 09:14:01 [a.py:1] done
"""
LOGS = {"kv-cache-none": KNOWN, "unknown": UNKNOWN, "": CLEAN}


def first(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    case = open_case([path], recipe=None, workspace=path.parent, exit_codes={})
    return next((found.rule for found in diagnose(case, RULES).diagnoses), "")


@pytest.mark.parametrize("name", PREFIXES)
def test_a_prefix_changes_no_diagnosis(name: str, tmp_path: Path) -> None:
    for expected, log in LOGS.items():
        lines = [PREFIXES[name] + line for line in log.splitlines()]
        assert first(tmp_path / "captured.log", lines) == expected


def test_a_count_or_a_clock_before_each_line(tmp_path: Path) -> None:
    for expected, log in LOGS.items():
        for before in ("{:5}\t", "17345386420{:02} "):
            lines = [before.format(n) + line for n, line in enumerate(log.splitlines(), 8)]
            assert first(tmp_path / "captured.log", lines) == expected


@pytest.mark.parametrize(
    "record",
    [{"stream": "stderr", "log": ""}, {"severity": "ERROR", "textPayload": ""}, {"MESSAGE": ""}],
)
def test_lines_in_a_collectors_json(record: dict[str, str], tmp_path: Path) -> None:
    (key,) = (key for key, value in record.items() if not value)
    for expected, log in LOGS.items():
        lines = [json.dumps({**record, key: f"{line}\n"}) for line in log.splitlines()]
        assert first(tmp_path / "captured.log", lines) == expected


def test_a_prefix_of_many_numbers_costs_no_time(tmp_path: Path) -> None:
    numbers = " ".join("1" * 12) + " node:"
    lines = [f"{numbers} {line}" for line in UNKNOWN.splitlines()] + ["1" * 4000] * 3
    assert first(tmp_path / "captured.log", lines) == "unknown"
