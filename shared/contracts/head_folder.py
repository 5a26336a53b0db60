# SPDX-License-Identifier: Apache-2.0
"""The one reader of anybody's EAGLE-3 head: its config as vLLM reads it, its tensors by name and shape.

In: a folder in our layout, NVIDIA ModelOpt's or the speculators library's. Out: a `Head`. Costs
milliseconds, since weights are read only when they are asked for.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from shared.contracts.head_variant import stated_mask_token
from shared.contracts.nested_config import flattened
from shared.errors import UserError
from shared.io.files import read_json
from shared.io.records import Shape, require_shape
from shared.io.safetensors_files import INDEX, list_files, opened, read_header

if TYPE_CHECKING:
    from torch import Tensor

Positive = Annotated[int, Field(gt=0)]
TokenId = Annotated[int, Field(ge=0)]
MASK_HIDDEN = "mask_hidden"  # the tensor that a P-EAGLE head alone has
_MANY = 64  # draft tokens, among so many of which some are neighbours in the target's vocabulary
_OFFSETS = "Absolute ids are not offsets: subtract arange(draft_vocab_size)."
# What trainers leave beside the weights, and vLLM passes over.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin")
# Parts of names that follow from config.json or from d2t: engines pass over such tensors.
DROPPED_WITHOUT_LOSS = ("t2d", "rotary_emb.", "rotary_pos_emb.")


class _Nested(Shape):
    eagle_aux_hidden_state_layer_ids: list[int] | None = None


class _Config(Shape):
    hidden_size: Positive
    vocab_size: Positive
    draft_vocab_size: Positive | None = None
    target_hidden_size: Positive | None = None
    num_hidden_layers: Annotated[int, Field(gt=0, le=64)] = 1
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    eagle_config: _Nested | None = None
    architectures: list[str] | None = None
    layer_types: list[str] | None = None
    sliding_window: Positive | None = None
    parallel_drafting: bool | None = None
    mask_token_id: TokenId | None = None
    pard_token: TokenId | None = None
    ptd_token_id: TokenId | None = None


@dataclass(frozen=True)
class Head:
    """Anybody's EAGLE-3 head: ours, ModelOpt's or the speculators library's.

    Attributes:
        layout: `eagle3`, or `speculators` where config.json is nested.
        config: what vLLM reads, flat.
        shapes: of each tensor, by its name in the file.
        stated: config.json as it is written.
    """

    folder: Path
    layout: str
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    stated: dict[str, Any]

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def target_hidden_size(self) -> int:
        return int(self.config.get("target_hidden_size") or self.hidden_size)

    @property
    def draft_vocab_size(self) -> int:
        return int(self.config.get("draft_vocab_size") or self.config["vocab_size"])

    @property
    def nested(self) -> dict[str, Any]:
        """`eagle_config`, or nothing."""
        return self.config.get("eagle_config") or {}

    @property
    def aux_layers(self) -> list[int] | None:
        """The aux layers in vLLM's numbering; None where only `eagle_config` or nothing names them."""
        return self.config.get("eagle_aux_hidden_state_layer_ids") or None

    @property
    def nested_aux_layers(self) -> list[int] | None:
        return self.nested.get("eagle_aux_hidden_state_layer_ids") or None

    def tensors(self) -> "dict[str, Tensor]":
        """Every tensor on the CPU, the layer's under our names (`midlayer.*`).

        Raises:
            UserError: a file is damaged.
        """
        found: dict[str, Tensor] = {}
        for path in weight_files(self.folder):
            found |= _read_tensors(path)
        return {our_name(name): tensor for name, tensor in found.items()}

    def tensor(self, name: str) -> "Tensor | None":
        """One tensor by its name in the file, such as d2t [D]; None where there is none."""
        for path in weight_files(self.folder):
            if (found := _read_tensors(path, only=name).get(name)) is not None:
                return found
        return None


def our_name(name: str) -> str:
    """`layers.0.mlp.up_proj.weight` is our `midlayer.mlp.up_proj.weight`."""
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def read_head(folder: Path) -> Head:
    """A head's config, flat as vLLM makes it, and its tensors' shapes; costs milliseconds.

    `parallel_drafting` is true in it for every P-EAGLE head: those of other makers may not say so.

    Raises:
        UserError: no config or weights, or no EAGLE-3 head.
    """
    where = folder / "config.json"
    raw = read_json(where)
    if not isinstance(raw, dict):
        raise _no_head(folder, f"config.json holds a {type(raw).__name__}")
    config, kind = raw, raw.get("speculators_model_type")
    if kind is not None:
        try:
            config = flattened(raw)
        except ValueError as error:
            raise _no_head(folder, str(error)) from error
    if missing := {"hidden_size", "vocab_size"} - config.keys():
        raise _no_head(folder, f"no {sorted(missing)} in config.json")
    require_shape(config, _Config, where=str(where), remedy="Export the head again.")
    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder):
        shapes |= _read_shapes(path)
    head = Head(folder, "eagle3" if kind is None else "speculators", config, shapes, raw)
    for name in shapes:
        if (ours := our_name(name)) != name and ours in shapes:
            raise misread(
                head, f"it has both {name} and {ours}, of which engines keep the last one read"
            )
    if kind == "peagle" or any(MASK_HIDDEN in name for name in shapes):
        return replace(head, config={**config, "parallel_drafting": True})
    return head


def _no_head(folder: Path, found: str) -> UserError:
    return UserError(
        f"{folder}: expected an EAGLE-3 head (config.json and *.safetensors or *.bin), "
        f"found {found}.",
        code="head-not-eagle3",
        remedy="Give the folder of an EAGLE-3 head; other kinds of drafters are not measured.",
        facts={"head": str(folder), "found": found},
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that vLLM loads: those of the index, else all safetensors, else pickles.

    Raises:
        UserError: there are none, the index is damaged, or a file that it names is missing.
    """
    if (folder / INDEX).exists():
        return list_files(folder)
    pickles = (path for path in sorted(folder.glob("*.bin")) if path.name not in _NO_WEIGHTS)
    if found := sorted(folder.glob("*.safetensors")) or list(pickles):
        return found
    raise _no_head(folder, "no weights")


def misread(
    head: Head, problem: str, remedy: str = "Export the head again.", **facts: Any
) -> UserError:
    """The refusal of a head that engines would serve as something that it is not."""
    return UserError(
        f"{head.folder}: {problem}.",
        code="head-misread",
        remedy=remedy,
        facts={"head": str(head.folder), **facts},
    )


def require_fc(head: Head) -> None:
    """Refuse what lacks the tensor that every EAGLE-3 head has, or has it under a longer name.

    Raises:
        UserError: with the names that are there.
    """
    if any(name.startswith("fc.") for name in head.shapes):
        return
    longer = [name for name in head.shapes if ".fc." in name]
    first = sorted(head.shapes)[:3]
    raise misread(
        head,
        f"it has no fc.weight, which combines the aux layers' states; found {longer or first}",
        "Rename its tensors (without that prefix)." if longer else "Give an EAGLE-3 head.",
        found=longer or first,
    )


def require_mask(head: Head) -> None:
    """Refuse a P-EAGLE head that lacks a half of its mask, the state or the token.

    Raises:
        UserError: vLLM would refuse it only once its engine starts.
    """
    if not head.config.get("parallel_drafting"):
        return
    if not any(MASK_HIDDEN in name for name in head.shapes):
        raise misread(head, f"it drafts in parallel and has no tensor {MASK_HIDDEN}")
    token, size = stated_mask_token(head.config), head.config["vocab_size"]
    if token is None or token >= size:
        raise misread(
            head,
            f"it has a {MASK_HIDDEN}, and config.json must name the mask token beside it, an id below "
            f"{size}; found {token}",
            "Set pard_token in its config.json to the token that it was trained with.",
        )


def draft_token_ids(head: Head, vocab_size: int) -> list[int]:
    """[D] the target's id of each draft token, in the head's own order.

    Raises:
        UserError: `d2t` is missing, holds no offsets to distinct ids below `vocab_size`, or says
            another thing than `t2d`.
    """
    if head.draft_vocab_size == vocab_size:
        if "d2t" in head.shapes:
            raise misread(head, "it has a d2t, though its vocabulary is the target's")
        return list(range(vocab_size))
    if (d2t := head.tensor("d2t")) is None:
        raise misread(
            head, "it has no d2t, and vLLM would map its tokens to the target's first ids"
        )
    if d2t.is_floating_point() or d2t.is_complex():
        raise misread(head, f"d2t must hold whole numbers, found {d2t.dtype}", _OFFSETS)
    if list(d2t.shape) != [head.draft_vocab_size]:
        raise misread(
            head,
            f"d2t must be [{head.draft_vocab_size}], one a draft token, found {list(d2t.shape)}",
        )
    ids = [index + int(offset) for index, offset in enumerate(d2t.tolist())]
    if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= vocab_size:
        raise misread(
            head,
            "d2t must hold offsets (target id = draft id + d2t[draft id]) to distinct ids below "
            f"{vocab_size}, found ids {min(ids)} to {max(ids)}, {len(ids) - len(set(ids))} twice",
            _OFFSETS,
        )
    t2d = head.tensor("t2d")  # [V], true for the draft vocabulary; engines do not read it
    if t2d is not None and t2d.any():
        if t2d.flatten().nonzero().flatten().tolist() != sorted(ids):
            raise misread(head, "d2t gives other target ids than t2d marks", _OFFSETS)
    elif len(ids) >= _MANY and bool((d2t[1:] > d2t[:-1]).all()):
        # Offsets stay equal wherever two neighbouring ids are both drafted.
        raise misread(
            head, "d2t rises from each draft token to the next, as absolute ids do", _OFFSETS
        )
    return ids


def _read_shapes(path: Path) -> dict[str, list[int]]:
    if path.suffix == ".bin":
        return {name: list(tensor.shape) for name, tensor in _read_tensors(path).items()}
    return {name: facts["shape"] for name, facts in read_header(path).items()}


def _read_tensors(path: Path, *, only: str | None = None) -> "dict[str, Tensor]":
    """The tensors of one file, by name.

    Raises:
        UserError: the file is damaged.
    """
    if path.suffix == ".bin":
        found = _unpickled(path)
        return {name: found[name] for name in found if only in (None, name)}
    with opened(path, "pt") as weights:
        names = [name for name in weights.keys() if only in (None, name)]  # noqa: SIM118 - no mapping
        return {name: weights.get_tensor(name) for name in names}


def _unpickled(path: Path) -> "dict[str, Tensor]":
    """The tensors of a `.bin`, by name."""
    from shared.io.tensor_files import is_dense, load_tensors, wrong

    label, remedy = "a head's tensors", "Give it as safetensors."
    tensors = load_tensors(path, label=label, remedy=remedy)
    if not isinstance(tensors, dict) or not all(map(is_dense, tensors.values())):
        raise wrong(path, TypeError("something else"), label=label, remedy=remedy)
    return {str(name): tensor for name, tensor in tensors.items()}
