# SPDX-License-Identifier: Apache-2.0
"""A plan as a recipe, as JSON, and as tables."""

import dataclasses
from typing import Any

import yaml
from rich import filesize
from rich.console import Console
from rich.table import Table

from shared.io.files import printable
from shared.runtime.tables import cell
from shared.vllm.batch import requests_in_flight
from stages.ops.chain import sizes
from stages.ops.config import PlanConfig
from stages.ops.expected import expectation, gate, published
from stages.ops.plan.model import Plan, chosen_aux_layers, longest, warnings
from stages.ops.plan.placement import Placement
from stages.ops.tables import read_data

_EPOCHS = 2  # of the recipe
_DRAFTED = 3  # tokens, of the recipe
_ANSWER_TOKENS = 256  # bench's default, in a target that has room for it
_DISK_SAMPLES = (5_000, 50_000, 500_000)


def recipe(plan: Plan, config: PlanConfig, *, sharded: bool = False) -> str:
    """A recipe that fits this target on GPUs of `config.gpu`.

    Args:
        sharded: whether each shard of dump is a pod of its own, with GPUs for one copy of the target.
    """
    target, placement = plan.target, plan.placements.get(config.gpu)
    split = {"tensor_parallel_size": placement.tensor_parallel} if placement else {}
    wide = dict(split)
    if placement and placement.pipeline_parallel > 1:
        wide["pipeline_parallel_size"] = placement.pipeline_parallel
    length = row_tokens(plan, config)
    run_section: dict[str, Any] = {
        "name": run_name(plan, config),
        "target": config.target or plan.model,
        "max_length_tokens": length,
        "draft_vocab_size": plan.head.draft_vocab_size,
    }
    if chosen_aux_layers(target) is not None:
        run_section["aux_layers"] = list(plan.head.aux_layers)
    if target.raw.get("auto_map"):
        run_section["trust_remote_code"] = config.trust_remote_code
    backend = plan.backend[0]
    dump: dict[str, Any] = {"backend": backend}
    if backend == "vllm":
        copies = 1 if sharded or not placement else max(1, placement.copies)
        dump |= {**split, "data_parallel": copies}
    sections: dict[str, dict[str, Any]] = {
        "run": run_section,
        "synth": {
            "prompts": config.prompts,
            "max_samples": config.samples,
            "max_tokens": length // 2,
            "concurrency": requests_in_flight(_gpu_bytes(config.gpu)) if placement else "auto",
            **wide,
        },
        "dump": dump,
        "train": _train_section(plan, placement),
        "bench": _bench_section(plan, config) | split,
    }
    remarks = _remarks(plan, config, has_gate=sections["bench"]["min_acceptance_length"] > 0)
    # What a config.json says must not end its comment and become a setting.
    head = "".join(f"# {printable(remark)}.\n" for remark in remarks)
    return head + "\n" + yaml.safe_dump(sections, sort_keys=False)


def _remarks(plan: Plan, config: PlanConfig, *, has_gate: bool) -> list[str]:
    """What stands above the recipe."""
    return [
        f"{plan.model} on {config.gpu}; {'; '.join(plan.target.kinds)}",
        f"dump: {plan.backend[1]}",
        "bench requires nine tenths of what was reached with as many rows or fewer"
        if has_gate
        else "bench requires no acceptance length: none is known for as few rows, or for such a target",
        *warnings(plan),
    ]


def _train_section(plan: Plan, placement: Placement | None) -> dict[str, Any]:
    train: dict[str, Any] = {"epochs": _EPOCHS, "mixed_precision": "bf16"}
    if plan.head.intermediate_size != plan.target.text.get("intermediate_size"):
        train["intermediate_size"] = plan.head.intermediate_size
    if placement and not placement.train_fits:
        train["distributed"] = "fsdp2"
    return train


def _bench_section(plan: Plan, config: PlanConfig) -> dict[str, Any]:
    bench: dict[str, Any] = {
        "num_speculative_tokens": _DRAFTED,
        "min_acceptance_length": gate(config.samples, plan.head.hidden_size),
    }
    # A prompt takes the other half, as in synth.
    if (half := longest(plan.target) // 2) < _ANSWER_TOKENS:
        bench["max_tokens"] = half
    return bench


def row_tokens(plan: Plan, config: PlanConfig) -> int:
    """Tokens of a conversation at most: `--length`, as far as the target has positions."""
    return min(config.length, longest(plan.target))


def _gpu_bytes(gpu: str) -> int:
    return int(read_data("gpus.yaml")[gpu]["memory_gib"] * 2**30)


def run_name(plan: Plan, config: PlanConfig) -> str:
    """`--name`, else the last part of the model's."""
    return config.name or plan.model.split("/")[-1].lower()


def expected(plan: Plan, config: PlanConfig) -> str:
    """What was reached with as many rows; "" where nothing compares."""
    return expectation(config.samples, _EPOCHS, plan.head.hidden_size)


def as_json(plan: Plan, config: PlanConfig) -> dict[str, Any]:
    """The plan for a program."""
    return {
        "model": plan.model,
        "architecture": plan.target.name,
        "kinds": plan.target.kinds,
        "parameters": plan.weights.parameters,
        "weight_bytes": plan.weights.bytes,
        "weights_source": plan.weights.source,
        "dump_backend": {"name": plan.backend[0], "reason": plan.backend[1]},
        "head": {**dataclasses.asdict(plan.head), "parameters": plan.head.num_parameters},
        "head_width_reason": plan.width_reason,
        "train_bytes": sizes.train_bytes(plan.head),
        "gpus": {gpu: placement.of_stages() for gpu, placement in plan.placements.items()},
        "dump_bytes": plan.disk_bytes(config.samples, row_tokens(plan, config)),
        "published": published(),
        "expected": expected(plan, config),
        "warnings": warnings(plan),
    }


def show(plan: Plan, config: PlanConfig, console: Console) -> None:
    """Print the plan."""
    console.print(_facts(plan, config))
    if plan.placements:
        console.print(_gpus(plan))
    console.print(_published())
    if line := expected(plan, config):
        console.print(f"expected: {line}", markup=False)
    for warning in warnings(plan):
        console.print(f"note: {warning}", markup=False)


def _facts(plan: Plan, config: PlanConfig) -> Table:
    target, head = plan.target, plan.head
    table = Table(title=cell(plan.model), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("architecture", cell(f"{target.name}: {', '.join(target.kinds)}"))
    size, how = plan.weights, target.quantization.get("quant_method") or "not quantised"
    count = "unknown" if size.parameters is None else f"{size.parameters:,}"
    shown = "unknown" if size.bytes is None else filesize.decimal(size.bytes)
    table.add_row("parameters", count)
    table.add_row("weights", cell(f"{shown} ({how}; {size.source})"))
    table.add_row("dump backend", cell(f"{plan.backend[0]}: {plan.backend[1]}"))
    table.add_row("aux layers", str(list(head.aux_layers)))
    table.add_row("draft head", f"{head.num_parameters:,} parameters of its own")
    table.add_row("its MLP width", f"{head.intermediate_size} ({plan.width_reason})")
    table.add_row(
        "its training state",
        f"{filesize.decimal(sizes.train_bytes(head))} a rank, and activations",
    )
    length = row_tokens(plan, config)
    for samples in dict.fromkeys((config.samples, *_DISK_SAMPLES)):
        taken = filesize.decimal(plan.disk_bytes(samples, length))
        table.add_row(f"states of {samples:,} samples", f"{taken} at {length} tokens each")
    return table


def _gpus(plan: Plan) -> Table:
    table = Table(title="GPUs")
    for column in ("type", "synth", "dump", "train", "bench"):
        table.add_column(column, overflow="fold")
    for gpu, placement in plan.placements.items():
        table.add_row(gpu, *placement.of_stages().values())
    return table


def _published() -> Table:
    table = Table(title="What has been reached, by others and by this project")
    for column in ("target", "samples", "epochs", "K", "acceptance length", "prompts", "source"):
        table.add_column(column, overflow="fold")
    for row in sorted(published(), key=lambda row: row.get("samples", 1 << 60)):
        samples = f"{row['samples']:,}" if "samples" in row else "not stated"
        length = f"{row['acceptance_length']:.2f}"
        epochs, k = (str(row.get(name, "not stated")) for name in ("epochs", "k"))
        about = (row.get("prompts", ""), row["source"])
        table.add_row(row["target"], samples, epochs, k, length, *about)
    return table
