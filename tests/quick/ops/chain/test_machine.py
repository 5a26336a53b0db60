# SPDX-License-Identifier: Apache-2.0
"""The machine as the chain finds it: its GPUs are those that CUDA would use."""

import os
import shutil
from pathlib import Path

import pytest

from stages.ops.chain.machine import look


def test_gpus_are_those_that_nvidia_smi_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA L4, 23034'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    machine = look()
    assert machine.gpus == (("NVIDIA H100 80GB HBM3", 81559 << 20), ("NVIDIA L4", 23034 << 20))
    assert machine.least_gpu_bytes == 23034 << 20
    assert machine.memory_bytes > 0
    tool.unlink()
    assert look().gpus == () or shutil.which("nvidia-smi")


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["A", "B", "C"]),
        ("2,0", ["C", "A"]),
        ("GPU-b", ["B"]),
        ("1,7,0", ["B"]),  # CUDA stops at the first that it does not know
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_those_that_cuda_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    """C shares its memory with the processor, and nvidia-smi has no size for it."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in *uuid*) printf 'GPU-aa\\nGPU-bb\\nGPU-cc\\n';; "
        "*) printf 'A, 10\\nB, 20\\nC, [N/A]\\n';; esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = look()
    assert [name for name, _ in machine.gpus] == names
    sizes = {"A": 10 << 20, "B": 20 << 20, "C": machine.memory_bytes}
    assert all(size == sizes[name] for name, size in machine.gpus)
