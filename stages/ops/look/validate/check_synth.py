# SPDX-License-Identifier: Apache-2.0
"""Are synth's rows rows? Asked of Parquet columns, none of them as Python lists.

Costs reading the ids and spans once; memory for one part.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.artifacts.manifest import MANIFEST
from shared.contracts import conversations
from shared.runtime.wording import counted
from stages.ops.look.validate.artifacts import RunView
from stages.ops.look.validate.findings import Wrong

_COLUMNS = (
    "sample_id",
    "conversation_id",
    "input_ids",
    "loss_spans",
    "num_prompt_tokens",
    "num_completion_tokens",
)


@dataclasses.dataclass
class _Totals:
    samples: set[str] = dataclasses.field(default_factory=set)
    conversations: set[str] = dataclasses.field(default_factory=set)
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0


def ask_rows(run: RunView) -> str:
    """Schema, token ids, spans, unique ids, and the totals in the manifest."""
    manifest, target = run.manifest("synth"), run.target("synth")
    totals = _Totals()
    parts = [name for name in manifest["files"] if Path(name).match(conversations.PART_GLOB)]
    for name in sorted(parts):
        _read_part(run.folder("synth") / name, totals, target.vocab_size if target else None)
    if len(totals.samples) != totals.rows:
        raise Wrong(
            f"{run.folder('synth')}: {totals.rows} rows have {len(totals.samples)} sample ids: "
            "some are there twice."
        )
    ok = manifest["counts"]["ok"]
    if len(totals.conversations) != ok:
        raise Wrong(
            f"{run.folder('synth') / MANIFEST}: counts {ok} answered prompts, the parts hold "
            f"{len(totals.conversations)} conversations."
        )
    recorded = manifest["facts"]
    for key in ("rows", "tokens", "trained_tokens"):
        if key in recorded and recorded[key] != getattr(totals, key):
            raise Wrong(
                f"{run.folder('synth') / MANIFEST}: facts say {key} = {recorded[key]}, the parts hold "
                f"{getattr(totals, key)}."
            )
    rows, tokens = counted(totals.rows, "row"), counted(totals.tokens, "token")
    return f"{rows}, {tokens}, {totals.trained_tokens:,} trained"


def _read_part(path: Path, totals: _Totals, vocab_size: int | None) -> None:
    """Check one part and add it up.

    Raises:
        UserError: another schema or version.
        Wrong: a token or a span that cannot be.
    """
    import numpy as np
    import pyarrow.compute as pc

    table = conversations.read_columns(path, _COLUMNS).combine_chunks()
    names = table["sample_id"].to_pylist()
    totals.samples.update(names)
    totals.conversations.update(table["conversation_id"].to_pylist())
    totals.rows += len(names)

    ids = table["input_ids"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(ids), 0).to_numpy(zero_copy_only=False)
    tokens = pc.list_flatten(ids).to_numpy(zero_copy_only=False)
    rows = pc.list_parent_indices(ids).to_numpy(zero_copy_only=False)
    outside = (tokens < 0) | (tokens >= (vocab_size or np.iinfo(np.int32).max))
    if outside.any():
        at = int(outside.argmax())
        raise Wrong(
            f"{path}: sample {names[rows[at]]} holds the token {int(tokens[at])}, outside the "
            f"target's vocabulary of {vocab_size}."
        )
    totals.tokens += len(tokens)
    totals.trained_tokens += _trained_tokens(path, table, names, lengths)


def _trained_tokens(path: Path, table: Any, names: Sequence[str], lengths: Any) -> int:
    """Tokens in the loss spans of a part whose rows have these `lengths` in tokens.

    Raises:
        Wrong: spans that overlap, leave their row, or hold more than the target generated.
    """
    import numpy as np
    import pyarrow.compute as pc

    spans = table["loss_spans"].combine_chunks()
    flat = pc.list_flatten(spans)
    owner = pc.list_parent_indices(spans).to_numpy(zero_copy_only=False)
    starts = pc.struct_field(flat, "start").to_numpy(zero_copy_only=False)
    ends = pc.struct_field(flat, "end").to_numpy(zero_copy_only=False)
    before = np.where(np.diff(owner, prepend=-1) == 0, np.roll(ends, 1), 0)
    wrong = (starts < before) | (ends <= starts) | (ends > lengths[owner])
    if wrong.any():
        at = int(wrong.argmax())
        raise Wrong(
            f"{path}: sample {names[owner[at]]} has the loss span [{starts[at]}, {ends[at]}) in "
            f"{lengths[owner[at]]} tokens: spans must be ascending and within them."
        )
    trained = np.bincount(owner, weights=ends - starts, minlength=len(names))
    answered = table["num_completion_tokens"].to_numpy()
    unfit = (trained == 0) | (trained > answered)
    if unfit.any():
        at = int(unfit.argmax())
        raise Wrong(
            f"{path}: sample {names[at]} has {int(trained[at])} trained tokens, of "
            f"{int(answered[at])} that the target generated."
        )
    return int(trained.sum())
