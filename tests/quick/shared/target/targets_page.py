# SPDX-License-Identifier: Apache-2.0
"""Writes `stages/dump/TARGETS.md` from the families of `tests/targets.py`.

python -m tests.quick.shared.target.targets_page
"""

import tempfile
from pathlib import Path

from shared.errors import UserError
from shared.io.safetensors_files import list_tensors
from shared.target.adapter import OutputLayer, output_layer
from shared.target.model import TargetConfig, read_config
from stages.ops.chain.served import how_served, needs_gpu
from stages.ops.plan.architecture import understand
from stages.ops.plan.placement import dump_backend
from tests import targets

PAGE = Path(__file__).resolve().parents[4] / "stages" / "dump" / "TARGETS.md"
HEAD = """# Supported targets

Dump and train take what a target computes between its last layer and its logits from its class in
transformers, so a family that is not listed here works too if that class follows one of these rules;
otherwise `python -m stages.ops run --dry_run` refuses it by name. This table is generated: for each
row a tiny target with random weights is made, and its logits are rebuilt from its final state to 1e-4.

Backend: `vllm` where vLLM has EAGLE-3 hooks for the class; `hf` where the states come from transformers.

Served: how vLLM 0.32 takes a draft head for it, as the dry run judges from config.json and transformers'
class: by its class of the target (yes), by its wrapper around transformers' class, which
`bench.engine_args: {model_impl: transformers}` asks for, or not at all. "On GPUs" is what vLLM cannot run
on a CPU beside a draft head; no GPU has run it yet. Engine tests hold each row to vLLM: its loader takes the
head, or refuses it; its engine drafts, and hands the head the states that transformers' class computes, or
fails. Vision models want torchvision beside vLLM; no engine has drafted for one yet.

| model_type | class | final norm | lm_head | logits | backend | served |
|---|---|---|---|---|---|---|
"""
_SERVED = {"auto": "yes", "transformers": "by the wrapper", "": "no"}


def describe(folder: Path, config: TargetConfig) -> str:
    """A target's norm, lm_head and logit rule as three cells; or its refusal."""
    try:
        layer = output_layer(config, list_tensors(folder))
    except UserError as error:
        return f"refused: `{error.code}` | | "
    tied = "the embedding" if layer.lm_head == layer.embedding else "its own"
    return f"{_norm(layer)} | {tied} | {_rule(layer)}"


def _norm(layer: OutputLayer) -> str:
    name = "LayerNorm" if layer.norm.is_centered else "RMSNorm"
    if not layer.norm.has_weight:
        return f"{name}, no weight"
    bias = ", bias" if layer.norm.has_bias else ""
    return name + (", 1 + weight" if layer.norm.offset else "") + bias


def _rule(layer: OutputLayer) -> str:
    rules = ["scaled"] if layer.logit_scale != 1 else []
    return ", ".join([*rules, *(["softcapped"] if layer.softcap is not None else [])])


def row(name: str, folder: Path) -> str:
    """A family's line of the table, from its tiny target in `folder`."""
    config = read_config(folder)
    architecture = understand(config.whole, str(folder / "config.json"))
    backend, _ = dump_backend(architecture)
    facts = describe(folder, config)
    cells = f"{name} | {architecture.name} | {facts}"
    served = "" if facts.startswith("refused") else _SERVED[how_served(config)]
    if served not in ("", "no") and needs_gpu(config, with_head=True):
        served += ", on GPUs"
    return f"| {cells} | {backend} | {served} |"


def main() -> None:
    """Make every tiny target and write the page."""
    lines = []
    for name in targets.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            targets.make(name, Path(folder))
            lines.append(row(name, Path(folder)))
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
