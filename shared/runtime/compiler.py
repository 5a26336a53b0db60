# SPDX-License-Identifier: Apache-2.0
"""What Triton needs beside its package: it compiles kernels, and code that starts them, while a stage runs.

vLLM does so on a GPU, and train. Without a C compiler or Python's headers the first kernel fails, after
minutes of loading.

Run as a script by another interpreter, it prints where that one's headers belong.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

REMEDY = "Install both (Debian and Ubuntu: apt-get install gcc python3-dev)"


def include_folder() -> Path:
    """Where this interpreter's headers belong; Triton looks there too."""
    # Debian's own scheme names a folder that its headers are not in.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    return Path(sysconfig.get_path("include", scheme))


def lacking(include: Path) -> str:
    """What is not there, in words; "" where a kernel could be compiled.

    Args:
        include: where the interpreter's headers belong.
    """
    found = []
    if not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))):
        found.append("no C compiler")
    if not (include / "Python.h").is_file():
        found.append(f"no {include / 'Python.h'}")
    return " and ".join(found)


if __name__ == "__main__":
    sys.stdout.write(f"{include_folder()}\n")
