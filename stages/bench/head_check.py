# SPDX-License-Identifier: Apache-2.0
"""Reads a draft head as vLLM will, and refuses what it would misread in silence.

In: a head's folder (`LlamaForCausalLMEagle3` and its like, or the speculators layout) and its
target's config. Out: warnings, or a UserError. Costs milliseconds: headers and `d2t` alone are read.
The surprise: vLLM serves nearly anything. It makes up a missing `norm.weight`, maps a missing `d2t`
to the first ids, drops an `input_norm.weight` whose flag is not set, and reads aux-layer ids that
lie only in `eagle_config` without the shift that their writers meant; each costs most of the
acceptance and not one line in the log. What is refused is wrong for certain, what may be meant is a
warning, in the log and in the report. Held to vLLM 0.32's `llama_eagle3.py`, `algos.py` and
`_get_eagle3_aux_layers_from_config`.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from shared.errors import UserError
from shared.io.files import read_json
from shared.io.records import Shape, require_shape
from shared.io.safetensors_files import read_header
from shared.target.model import TargetConfig

_LAYER = (
    "input_layernorm",
    "hidden_norm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


Positive = Annotated[int, Field(gt=0)]


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


@dataclass(frozen=True)
class Head:
    """A head's folder, as far as a wrong reading can come from it."""

    folder: Path
    layout: str  # "hf" or "speculators"
    config: dict[str, Any]  # what vLLM reads, flat
    shapes: dict[str, list[int]]  # tensor name -> shape, with midlayer. as layers.0.
    warnings: list[str] = field(default_factory=list)

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def draft_vocab_size(self) -> int:
        return int(self.config.get("draft_vocab_size") or self.config["vocab_size"])

    @property
    def nested(self) -> dict[str, Any]:
        found = self.config.get("eagle_config")
        return found if isinstance(found, dict) else {}

    def refuse(
        self, expected: str, found: object, remedy: str = "Export the head again."
    ) -> UserError:
        return UserError(f"{self.folder}: expected {expected}, found {found}. {remedy}")


def check(folder: Path, target: TargetConfig) -> list[str]:
    """The warnings that a report shall carry.

    Raises:
        UserError: the head is of another target, not whole, or certain to be misread by vLLM.
    """
    head = read(folder)
    _check_target(head, target)
    _check_tensors(head)
    _check_vocabulary(head, target)
    _check_aux_layers(head, target)
    _check_norms(head)
    return head.warnings


def read(folder: Path) -> Head:
    """The head's config, flattened as vLLM does, and its tensors' shapes.

    Raises:
        UserError: no config or weights, or no EAGLE-3 head.
    """
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise UserError(
            f"{folder}/config.json: expected a head's config, found {type(raw).__name__}."
        )
    kind = raw.get("speculators_model_type")
    if kind is not None:
        inner = raw.get("transformer_layer_config")
        if kind != "eagle3" or not isinstance(inner, dict):
            raise UserError(
                f"{folder}/config.json: expected speculators_model_type eagle3 with a "
                f"transformer_layer_config, found {kind!r}. bench measures EAGLE-3 heads."
            )
        raw = {**inner, **{k: v for k, v in raw.items() if k != "eagle_config"}}
    if missing := {"hidden_size", "vocab_size"} - raw.keys():
        raise UserError(
            f"{folder}/config.json: expected an EAGLE-3 head's config, found none of {sorted(missing)}."
        )
    require_shape(raw, _Config, where=f"{folder}/config.json", remedy="Export the head again.")
    shapes = {
        name.removeprefix("model.").replace("midlayer.", "layers.0."): shape
        for name, shape in _shapes(folder).items()
    }
    return Head(folder, "hf" if kind is None else "speculators", raw, shapes)


def _shapes(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        found |= {name: facts["shape"] for name, facts in header.items() if name != "__metadata__"}
    if found:
        return found
    for path in sorted(folder.glob("pytorch_model*.bin")):
        found |= {name: list(tensor.shape) for name, tensor in _pickled(path).items()}
    if not found:
        raise UserError(
            f"{folder}: expected the head's weights (*.safetensors or pytorch_model.bin), found none."
        )
    return found


def _check_target(head: Head, target: TargetConfig) -> None:
    width = head.config.get("target_hidden_size", head.hidden_size)
    found = (head.config["vocab_size"], width)
    expected = (target.vocab_size, target.hidden_size)
    if found != expected:
        raise UserError(
            f"{head.folder}/config.json: expected a head for {target.folder} (vocabulary, hidden size: "
            f"{expected}), found one for another target {found}. Bench it with its own."
        )


def _check_tensors(head: Head) -> None:
    """VLLM leaves what the file lacks as it was allocated, and says nothing."""
    hidden = [head.hidden_size]
    if head.nested.get("use_aux_hidden_state") is False:
        raise head.refuse(
            "use_aux_hidden_state: true",
            "false, with which vLLM drops fc.weight in silence",
            "Set eagle_config.use_aux_hidden_state in its config.json.",
        )
    expected = {"norm.weight": hidden}
    if head.draft_vocab_size < head.config["vocab_size"]:
        expected["lm_head.weight"] = [head.draft_vocab_size, head.hidden_size]
        expected["d2t"] = [head.draft_vocab_size]
    found = {name: head.shapes.get(name) for name in expected}
    if found != expected:
        raise head.refuse(str(expected), found)
    names = {"fc.weight"}
    if "quantization_config" not in head.config:
        depth = int(head.config.get("num_hidden_layers", 1))
        names |= {
            f"layers.{i}.{name}.weight" for i in range(depth) for name in _LAYER[:1] + _LAYER[2:]
        }
        names.add("layers.0.hidden_norm.weight")
    if missing := names - head.shapes.keys():
        raise head.refuse("every tensor of an EAGLE-3 head", f"none named {sorted(missing)}")


def _check_vocabulary(head: Head, target: TargetConfig) -> None:
    tied, own = bool(head.config.get("tie_word_embeddings")), head.shapes.get("lm_head.weight")
    if own is None:
        head.warnings.append(
            "The head has no lm_head.weight: vLLM gives it the target's"
            + (", although its config ties it to the embedding." if tied else ".")
        )
    elif tied:
        head.warnings.append(
            "tie_word_embeddings is true: vLLM ignores it and uses the head's lm_head.weight; other "
            "engines tie. Set it to false."
        )
    rows = own[0] if own else head.draft_vocab_size
    if rows != head.draft_vocab_size:
        raise head.refuse(
            f"draft_vocab_size {rows}, the rows of lm_head.weight",
            f"{head.draft_vocab_size}",
            "Set draft_vocab_size in its config.json.",
        )
    if "d2t" not in head.shapes:
        return
    if head.draft_vocab_size == target.vocab_size:
        raise head.refuse("no d2t where the draft vocabulary is the target's", "d2t")
    offsets = _read_d2t(head)
    ids = [index + offset for index, offset in enumerate(offsets)]
    if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= target.vocab_size:
        raise head.refuse(
            f"offsets in d2t (target id = draft id + d2t[draft id], distinct, below {target.vocab_size})",
            f"ids from {min(ids)} to {max(ids)}, {len(ids) - len(set(ids))} twice",
            "Absolute ids are not offsets: subtract arange(draft_vocab_size).",
        )


def _read_d2t(head: Head) -> list[int]:
    for kind in ("*.safetensors", "pytorch_model*.bin"):
        for path in sorted(head.folder.glob(kind)):
            if (offsets := _d2t_in(path)) is not None:
                return offsets
    return []


def _d2t_in(path: Path) -> list[int] | None:
    """The offsets in one file of weights; None where it has none.

    Raises:
        UserError: the file is damaged, or they are no whole numbers.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".bin":
            found = _pickled(path).get("d2t")
        else:
            with safe_open(path, "np") as weights:
                names = [name for name in weights.keys() if name.endswith("d2t")]  # noqa: SIM118 - no mapping
                found = weights.get_tensor(names[0]) if names else None
        return None if found is None else [int(value) for value in found.flatten().tolist()]
    except (SafetensorError, OSError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{path}: expected the head's d2t, found: {error}.") from error


def _pickled(path: Path) -> dict[str, Any]:
    """The tensors of a `.bin`, by name."""
    from shared.io.tensor_files import is_dense, load_tensors

    label, remedy = "a head's tensors", "Give it as safetensors."
    tensors = load_tensors(path, label=label, remedy=remedy)
    if not isinstance(tensors, dict) or not all(map(is_dense, tensors.values())):
        raise UserError(f"{path}: expected {label}, found something else. {remedy}")
    return {str(name): tensor for name, tensor in tensors.items()}


def _check_aux_layers(head: Head, target: TargetConfig) -> None:
    own = head.config.get("eagle_aux_hidden_state_layer_ids")
    nested = head.nested.get("eagle_aux_hidden_state_layer_ids")
    default = [2, target.num_layers // 2, target.num_layers - 3]
    used = own or nested or default
    if not own and nested and nested != default:
        shifted = [layer + 1 for layer in nested]
        raise head.refuse(
            "eagle_aux_hidden_state_layer_ids at the top of config.json, in vLLM's numbering",
            f"{nested} in eagle_config alone, which vLLM takes unshifted",
            f"Where they count the layer whose output it is, add {shifted} at the top, else {nested}.",
        )
    if not own and not nested:
        head.warnings.append(
            f"The head names no aux layers: vLLM takes {default}. Trained on others, it is misread."
        )
    if own and nested and nested not in (own, [layer - 1 for layer in own]):
        head.warnings.append(
            f"eagle_config's aux layers {nested} are not the top-level {own}, which vLLM takes."
        )
    ascending = all(low < high for low, high in itertools.pairwise(used))
    if not ascending or used[0] < 0 or used[-1] > target.num_layers:
        raise head.refuse(
            f"ascending eagle_aux_hidden_state_layer_ids within the target's {target.num_layers} layers",
            used,
        )
    width = [head.hidden_size, len(used) * target.hidden_size]
    if head.shapes["fc.weight"] != width:
        raise head.refuse(
            f"fc.weight {width} for the {len(used)} aux layers {used}", head.shapes["fc.weight"]
        )


def _check_norms(head: Head) -> None:
    """Flags and tensors must agree: vLLM drops a norm without its flag, and fills in ones."""
    flags: Mapping[str, Any] = head.config
    before_fc = bool(head.nested.get("norm_before_fc", flags.get("norm_before_fc", False)))
    pairs = {
        "norm_before_fc": (before_fc, "input_norm.weight" in head.shapes),
        "fc_norm": (
            bool(flags.get("fc_norm", False)),
            any(name.startswith("fc_norm.") for name in head.shapes),
        ),
    }
    for name, (flag, there) in pairs.items():
        if flag != there:
            raise head.refuse(
                f"{name} to say whether its tensors are there",
                f"{name}={str(flag).lower()} and {'such' if there else 'no such'} tensors",
                "vLLM would drop or make up that norm in silence: set the flag as it was trained.",
            )
    if flags.get("norm_output"):
        head.warnings.append(
            "norm_output is true: vLLM feeds the normed state to the next draft step. A trainer that "
            "means another thing by it loses acceptance from position 1 on."
        )
    if head.layout == "speculators" and "norm_before_residual" not in flags:
        head.warnings.append("norm_before_residual is not given: in this layout vLLM takes true.")
