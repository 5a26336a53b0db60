# SPDX-License-Identifier: Apache-2.0
"""Are dump's files the target's states? Every file is opened, mapped, and looked into.

Legend: T tokens of a shard, A aux layers, H hidden size, V vocabulary.

Costs reading ids and masks whole, and 64 MiB of states a file, evenly spread: what is wrong there
and was wrong when it was written shows without reading a terabyte again.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.contracts import conversations
from shared.contracts.layers import LAYER_ID_CONVENTION
from shared.io import files
from shared.runtime.wording import counted
from stages.ops.look.validate.artifacts import RunView
from stages.ops.look.validate.findings import Wrong, needs

if TYPE_CHECKING:
    import torch

    from shared.contracts.hidden_states import Shard
    from shared.contracts.row_files import RowFile

STATE_BYTES_A_FILE = 64 << 20
ROWS_COMPARED = 64


def ask_data_config(run: RunView) -> str:
    """`data_config.json` says what the manifest, the target and the parents say."""
    manifest, found = run.manifest("dump"), run.data_config
    facts, layers = manifest["facts"], found["hidden_states"]
    depth = found["model"]["num_hidden_layers"]
    expected: dict[str, tuple[Any, Any]] = {
        "schema_version": (1, found["schema_version"]),
        "aux_layer_ids": (facts["aux_layers"], layers["aux_layer_ids"]),
        "layer_ids": ([*facts["aux_layers"], depth], layers["layer_ids"]),
        "layer_id_convention": (LAYER_ID_CONVENTION, layers["layer_id_convention"]),
        "final_hidden": ("prenorm", layers["final_hidden"]),
        "target_weights_hash": (facts["target_hash"], found["model"]["target_weights_hash"]),
        "num_tokens": (facts["tokens"], found["data"]["num_tokens"]),
        "num_samples": (manifest["counts"]["ok"], found["data"]["num_samples"]),
        "layout": (facts["layout"], found["format"]["layout"]),
        "parents": (manifest["parents"], found["data"]["parents"]),
    }
    if target := run.target("dump"):
        expected["hidden_size"] = (target.hidden_size, found["model"]["hidden_size"])
        expected["vocab_size"] = (target.vocab_size, found["model"]["vocab_size"])
        expected["num_hidden_layers"] = (target.num_layers, depth)
    for name, (wanted, stated) in expected.items():
        if wanted != stated:
            raise Wrong(
                f"{run.folder('dump') / 'data_config.json'}: expected {name} = {wanted!r}, found "
                f"{stated!r}. Run dump again with --overwrite."
            )
    return f"aux layers {layers['aux_layer_ids']}, hidden size {found['model']['hidden_size']}"


def ask_capture(run: RunView) -> str:
    """What the checks at capture found is within the limits that were set."""
    manifest = run.manifest("dump")
    facts, config = manifest["facts"], manifest["config"]
    # Null where nothing was checked: no greedy answers, or a backend without probabilities.
    agreement, gap = (
        None if facts[name] is None else float(facts[name]) for name in ("agreement", "logprob_gap")
    )
    if facts["greedy"] and agreement is not None and not agreement >= config["min_agreement"]:
        raise Wrong(
            f"the states name {agreement:.1%} of the target's own greedy tokens, less than "
            f"dump.min_agreement {config['min_agreement']:.1%}."
        )
    if gap is not None and not gap <= config["max_logprob_gap"]:
        raise Wrong(
            f"log-probabilities rebuilt from the states are {gap} nats off, more than "
            f"dump.max_logprob_gap {config['max_logprob_gap']}."
        )
    recorded = {"agreement": agreement, "log-probability gap in nats": gap}
    return ", ".join(
        f"{name} {'not checked' if value is None else f'{value:.4f}'}"
        for name, value in recorded.items()
    )


@dataclasses.dataclass
class _Sums:
    samples: list[str] = dataclasses.field(default_factory=list)
    tokens: int = 0
    counts: "torch.Tensor | None" = None  # [V] how often each token is trained on


def ask_states(run: RunView) -> str:
    """Every file opens without running code, fits its config, and holds states that live."""
    with needs("torch"):
        import torch

        from shared.contracts import hidden_states
    sums, vocab_size = _Sums(), run.data_config["model"]["vocab_size"]
    sums.counts = torch.zeros(vocab_size, dtype=torch.int64)
    looked_bytes = 0
    for path, shard in _shards(run):
        ids, mask = shard.input_ids, shard.loss_mask.bool()
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise Wrong(f"{path}: holds token ids outside the vocabulary of {vocab_size}.")
        if int(shard.loss_mask.max()) > 1 or not bool(mask.any()):
            raise Wrong(f"{path}: its loss mask must be zeros and ones, some of them ones.")
        sums.samples += shard.sample_ids
        sums.tokens += ids.numel()
        sums.counts += torch.bincount(ids[mask].long(), minlength=vocab_size)
        looked_bytes += _look_into(path, shard)
    _check_sums(run, sums)
    freq = hidden_states.read_token_freq(run.folder("dump"), vocab_size)
    if not _has_window(run) and not torch.equal(freq, sums.counts):
        raise Wrong(
            f"{run.folder('dump') / hidden_states.TOKEN_FREQ}: counts {int(freq.sum())} answer "
            f"tokens, the files hold {int(sums.counts.sum())}, or others. Run dump again."
        )
    return (
        f"{counted(len(sums.samples), 'sample')}, {counted(sums.tokens, 'token')}, "
        f"{looked_bytes / 1e6:.0f} MB of states looked at"
    )


def _shards(run: RunView) -> Iterator[tuple[Path, "Shard | RowFile"]]:
    from shared.contracts import hidden_states
    from shared.contracts.row_files import RowFile

    num_states = len(run.data_config["hidden_states"]["layer_ids"])
    hidden_size = run.data_config["model"]["hidden_size"]
    names = [name for name in run.manifest("dump")["files"] if name.endswith(".pt")]
    for name in sorted(names):
        path = run.folder("dump") / name
        if path.name.startswith("shard_"):
            yield (
                path,
                hidden_states.read_shard(path, num_states=num_states, hidden_size=hidden_size),
            )
        elif path.name.startswith("data_"):
            yield path, RowFile(path, num_states, hidden_size)


def _look_into(path: Path, shard: "Shard | RowFile") -> int:
    """Bytes of states [T, A+1, H] looked at: finite, no layer of zeros, none that never changes."""
    first = shard.states(slice(0, 1))
    token_bytes = first.numel() * first.element_size()
    step = max(1, len(shard.input_ids) * token_bytes // STATE_BYTES_A_FILE)
    seen = shard.states(slice(None, None, step))
    wrong = ~seen.isfinite().all(dim=2)  # [T', A+1]
    if bool(wrong.any()):
        token, layer = wrong.nonzero()[0].tolist()
        raise Wrong(f"{path}: token {token * step}, state {layer} holds NaN or infinity.")
    for layer in range(seen.shape[1]):
        if not bool(seen[:, layer].any(dim=1).all()):
            token = int((~seen[:, layer].any(dim=1)).nonzero()[0]) * step
            raise Wrong(f"{path}: token {token}, state {layer} is all zeros.")
        if len(seen) > 1 and bool((seen[:, layer] == seen[0, layer]).all()):
            raise Wrong(f"{path}: state {layer} is the same at every token.")
    return len(seen) * token_bytes


def _has_window(run: RunView) -> bool:
    return bool(run.manifest("dump")["identity"].get("dump.window"))


def _check_sums(run: RunView, sums: _Sums) -> None:
    manifest = run.manifest("dump")
    if len(set(sums.samples)) != len(sums.samples):
        raise Wrong(f"{run.folder('dump')}: a sample is there twice.")
    if _has_window(run):  # most shards were removed when train had read them
        return
    expected = (manifest["counts"]["ok"], manifest["facts"]["tokens"])
    found = (len(sums.samples), sums.tokens)
    if found != expected:
        raise Wrong(
            f"{run.folder('dump')}: expected {expected[0]} samples of {expected[1]} tokens as the "
            f"manifest says, found {found[0]} of {found[1]}."
        )


def ask_same_rows(run: RunView) -> str:
    """The states' ids and masks are those of synth's rows of the same name."""
    with needs("torch"):
        import torch  # noqa: F401 - the shards need it
    if "synth" not in run.manifest("dump")["parents"]:
        return "not from synth's rows"
    if run.data_config["format"]["layout"] == "samples":
        return "layout samples names no rows"
    wanted: dict[str, tuple[list[int], list[int]]] = {}
    for _, shard in _shards(run):
        for index in range(0, len(shard.sample_ids), 1 + len(shard.sample_ids) // 8):
            rows = shard.rows(index)
            ids, mask = shard.input_ids[rows].tolist(), shard.loss_mask[rows].tolist()
            wanted[shard.sample_ids[index]] = (ids, mask)
        if len(wanted) >= ROWS_COMPARED:
            break
    compared = 0
    for path in sorted(run.folder("synth").glob(conversations.PART_GLOB)):
        names = set(conversations.read_columns(path, ["sample_id"])["sample_id"].to_pylist())
        if not names & wanted.keys():
            continue
        for row in conversations.read_part(path):
            if row.sample_id not in wanted:
                continue
            ids, mask = wanted[row.sample_id]
            if list(row.input_ids[: len(ids)]) != ids or row.loss_mask()[: len(ids)] != mask:
                raise Wrong(
                    f"{run.folder('dump')}: sample {row.sample_id} has other tokens or another "
                    f"mask than in {path}."
                )
            compared += 1
    if compared != len(wanted):
        raise Wrong(
            f"{run.folder('dump')}: {len(wanted) - compared} of {len(wanted)} samples are not among "
            "synth's rows."
        )
    return f"{counted(compared, 'sample')} compared with synth's rows"


def ask_sidecars(run: RunView) -> str:
    """What each shard's own file says of it agrees with the manifest."""
    entries = run.manifest("dump")["files"]
    names = [n for n in entries if n.startswith("shard_") and n.endswith(".json")]
    for name in names:
        sidecar = files.read_json(run.folder("dump") / name)
        for file, entry in sidecar["files"].items():
            if _has_window(run) and file not in entries:
                continue
            if entries.get(file) != entry:
                raise Wrong(
                    f"{run.folder('dump') / name}: says another size or checksum of {file} than "
                    "the manifest."
                )
    return counted(len(names), "shard")
