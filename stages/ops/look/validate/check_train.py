# SPDX-License-Identifier: Apache-2.0
"""Did the training learn, and is the export the head that it found best?

Legend: D draft vocabulary, V target vocabulary, K draft length.
"""

import itertools
import json
import math
from typing import Any

from shared.runtime.wording import counted
from stages.ops.look.validate.artifacts import RunView
from stages.ops.look.validate.findings import Skipped, Wrong, ask_falling, needs


def _history(run: RunView) -> list[dict[str, Any]]:
    path = run.folder("train") / "history.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask_loss(run: RunView) -> str:
    """Every loss is a number, and the last ones are below the first ones."""
    path = run.folder("train") / "history.jsonl"
    records = [record for record in _history(run) if "loss" in record]
    losses = [float(record["loss"]) for record in records]
    for record, loss in zip(records, losses, strict=True):
        if not math.isfinite(loss):
            raise Wrong(f"{path}: the loss at step {record['step']} is {loss}.")
    steps = [record["step"] for record in records]
    if any(late <= early for early, late in itertools.pairwise(steps)):
        raise Wrong(f"{path}: its steps do not ascend.")
    facts = run.manifest("train")["facts"]
    if not losses or steps[-1] != facts["steps"]:
        raise Wrong(
            f"{path}: expected records up to step {facts['steps']}, found {steps[-1:] or 'none'}."
        )
    return f"{ask_falling(losses)}, {counted(facts['steps'], 'step')}"


def ask_walk(run: RunView) -> str:
    """The walked acceptance length that was kept is the best one of the history."""
    manifest = run.manifest("train")
    recorded, maximum = (
        manifest["facts"]["walked_acceptance_length"],
        manifest["config"]["walk_tokens"] + 1,
    )
    if recorded is None:
        raise Skipped("nothing was walked: no held-out greedy answers")
    key = "walked_acceptance_length"
    walks = {record["step"]: record[key] for record in _history(run) if key in record}
    if not 1 <= recorded <= maximum:
        raise Wrong(f"the walked acceptance length is {recorded}, outside 1 to {maximum}.")
    best = manifest["facts"]["best_step"]
    if walks.get(best) != recorded or recorded != max(walks.values()):
        raise Wrong(
            f"{run.folder('train')}: the manifest says {recorded:.3f} at step {best}, the history's "
            f"best is {max(walks.values(), default=math.nan):.3f}."
        )
    return f"{recorded:.3f} at step {best}"


def ask_vocabulary(run: RunView) -> str:
    """`d2t` and `t2d` fit each other, the recipe and the target."""
    with needs("torch"):
        from shared.contracts import hidden_states, vocab
    folder, config = run.folder("train"), run.manifest("train")["config"]
    draft = vocab.read(folder)
    size, target_size = config["run"]["draft_vocab_size"], run.data_config["model"]["vocab_size"]
    if (draft.size, draft.t2d.numel()) != (size, target_size):
        raise Wrong(
            f"{folder}: expected {size} of {target_size} tokens, found {draft.size} of "
            f"{draft.t2d.numel()}."
        )
    counts = hidden_states.read_token_freq(run.folder("dump"), target_size)
    return f"{size} of {target_size} tokens hold {vocab.coverage(draft, counts):.2%} of the answers"


def _best_weights(run: RunView) -> dict[str, Any]:
    """The weights of the best checkpoint, mapped."""
    from shared.io.tensor_files import is_dense, load_tensors

    path = run.folder("train") / "checkpoints" / "best.pt"
    label, remedy = "a checkpoint", "Run train again with --overwrite."
    state = load_tensors(path, label=label, remedy=remedy)
    weights = state.get("weights") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(map(is_dense, weights.values())):
        raise Wrong(f"{path}: expected {label}, found no weights. {remedy}")
    return {"step": state.get("step"), **weights}


def ask_checkpoint(run: RunView) -> str:
    """The best checkpoint opens, is of the best step, and its weights are numbers."""
    with needs("torch"):
        weights = _best_weights(run)
    step, best = weights.pop("step"), run.manifest("train")["facts"]["best_step"]
    if step != best:
        raise Wrong(f"checkpoints/best.pt is of step {step}, the manifest says {best}.")
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise Wrong(f"checkpoints/best.pt: {name} holds NaN or infinity.")
    return f"step {step}, {counted(len(weights), 'tensor')}, all finite"


def ask_export(run: RunView) -> str:
    """Exactly the keys, tensors, shapes and types that engines load."""
    with needs("torch"):
        from shared.contracts.exported_head import check_export
    head = check_export(run.folder("export"))
    model, layers = run.data_config["model"], run.data_config["hidden_states"]
    expected = (tuple(layers["aux_layer_ids"]), model["vocab_size"], model["hidden_size"])
    found = (head.aux_layers, head.vocab_size, head.hidden_size)
    if found != expected:
        raise Wrong(
            f"{run.folder('export') / 'config.json'}: expected aux layers, vocabulary and hidden "
            f"size {expected} as dump says, found {found}. Export again."
        )
    return f"D {head.draft_vocab_size} of V {head.vocab_size}, aux layers {list(head.aux_layers)}"


def ask_exported_weights(run: RunView) -> str:
    """The export's tensors and vocabulary are those of the best checkpoint and of train."""
    with needs("torch"):
        import torch
        from safetensors.torch import load_file

        from shared.contracts import vocab
    path = run.folder("export") / "model.safetensors"
    exported, best = load_file(path), _best_weights(run)
    draft = vocab.read(run.folder("train"))
    if "d2t" in exported and not torch.equal(exported["d2t"], draft.d2t):
        raise Wrong(
            f"{path}: its d2t is not that of {run.folder('train') / vocab.D2T}: every drafted "
            "token would be mapped wrong. Export again."
        )
    compared = sorted(exported.keys() & best.keys())
    for name in compared:
        if not torch.equal(exported[name], best[name].to(exported[name].dtype)):
            raise Wrong(f"{path}: {name} is not that of checkpoints/best.pt. Export again.")
    if not {"fc.weight", "lm_head.weight"} <= set(compared):
        raise Wrong(f"{path}: shares only {compared} with checkpoints/best.pt.")
    return f"{counted(len(compared), 'tensor')} compared with step {best['step']}"


def ask_card(run: RunView) -> str:
    """The model card names the target that the head serves."""
    path = run.folder("export") / "README.md"
    target = run.manifest("export")["config"]["run"]["target"]
    if target not in path.read_text(encoding="utf-8"):
        raise Wrong(f"{path}: does not name the target {target}.")
    return f"for {target}"
