# SPDX-License-Identifier: Apache-2.0
"""Which tensors lie between a target's hidden states and its tokens, and what is computed with them.

In: config.json and the names, dtypes and shapes of the tensors, from their files' headers or the
hub's metadata. Out: an `OutputLayer`, or a refusal that names what is wrong. No weight is read, so a
dry run can ask before anything expensive starts.

Names are found by suffix, since the same text model lies under `model.`, `model.language_model.`,
`language_model.model.`, `thinker.model.` or nothing. Example: for the embedding
`thinker.model.embed_tokens.weight` the final norm is `thinker.model.norm.weight`, and lm_head the
first there is of `thinker.model.lm_head`, `thinker.lm_head` and `lm_head`.
"""

import dataclasses
from collections.abc import Mapping

from shared.errors import UserError
from shared.io.safetensors_files import TensorInfo
from shared.target.classes import class_facts
from shared.target.model import TargetConfig
from shared.target.probe import ClassFacts, NormRule

_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclasses.dataclass(frozen=True)
class OutputLayer:
    """The target from its final hidden state to its logits.

    Attributes:
        embedding: name of the tensor [V, H].
        norm_weight, norm_bias: names of the tensors [H]; None where the norm has none.
        lm_head: name of the tensor [V, H]; the embedding's where they are tied.
        logit_scale, softcap: logits = c * tanh(s * lm_head(y) / c), or s * lm_head(y) where c is None.
    """

    embedding: str
    norm_weight: str | None
    norm_bias: str | None
    lm_head: str
    norm: NormRule
    logit_scale: float
    softcap: float | None


def output_layer(target: TargetConfig, tensors: Mapping[str, TensorInfo]) -> OutputLayer:
    """The target's output layer.

    Raises:
        UserError: no class knows it, its rules are none of ours, or its tensors do not fit.
    """
    facts = class_facts(target)
    if facts.has_head_bias:
        raise _biased(target, facts)
    prefix = _text_prefix(target, facts, tensors)
    norm = f"{prefix}{facts.final_norm}"
    layer = OutputLayer(
        f"{prefix}{facts.embedding}.weight",
        f"{norm}.weight" if facts.norm.has_weight else None,
        f"{norm}.bias" if facts.norm.has_bias else None,
        _lm_head(target, facts, prefix, tensors),
        facts.norm,
        facts.logit_scale,
        facts.softcap,
    )
    matrix, vector = [target.vocab_size, target.hidden_size], [target.hidden_size]
    _check(target, tensors, layer.embedding, matrix)
    _check(target, tensors, layer.lm_head, matrix)
    for name in filter(None, (layer.norm_weight, layer.norm_bias)):
        _check(target, tensors, name, vector)
    return layer


def _text_prefix(target: TargetConfig, facts: ClassFacts, tensors: Mapping[str, TensorInfo]) -> str:
    """What stands before the text model's own names, e.g. `model.language_model.`."""
    suffix = f"{facts.embedding}.weight"
    prefixes = [
        name.removesuffix(suffix)
        for name in tensors
        if name == suffix or name.endswith(f".{suffix}")
    ]
    norm = f"{facts.final_norm}.weight"
    if facts.norm.has_weight:
        prefixes = [prefix for prefix in prefixes if f"{prefix}{norm}" in tensors]
    if len(prefixes) > 1:  # a speech model beside it, or layers that predict further tokens
        last = f"{facts.layers}.{target.num_layers - 1}."
        prefixes = [
            prefix
            for prefix in prefixes
            if any(name.startswith(f"{prefix}{last}") for name in tensors)
        ]
    if len(prefixes) != 1:
        raise UserError(
            f"{target.folder}: expected the tensors {suffix} and {norm} of one text model, as "
            f"{facts.name} has them, found {len(prefixes)} of that kind.",
            code="target-tensors-missing",
            remedy="Restore the weights as they were published, in safetensors files.",
            facts={"class": facts.name, "found": prefixes},
        )
    return prefixes[0]


def _lm_head(
    target: TargetConfig, facts: ClassFacts, prefix: str, tensors: Mapping[str, TensorInfo]
) -> str:
    """Its own tensor where there is one, as engines prefer it; else the embedding where tied."""
    parts = prefix.split(".")[:-1]
    owners = [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
    embedding = f"{prefix}{facts.embedding}.weight"
    for head in (f"{owner}.{facts.lm_head}".lstrip(".") for owner in owners):
        if f"{head}.bias" in tensors:
            raise _biased(target, facts)
        if f"{head}.weight" in tensors:
            return f"{head}.weight"
        if packed := [name for name in tensors if name.startswith(f"{head}.")]:
            raise _quantized(target, packed[0], "a packed form")
    if facts.ties or any(part.get("tie_word_embeddings") for part in target.parts):
        return embedding
    # Some families store it under another name than their class, e.g. GPT-NeoX's embed_out.
    alike = [
        name
        for name, tensor in tensors.items()
        if name != embedding
        and ".".join(name.split(".")[:-2]) in owners
        and list(tensor["shape"]) == list(tensors[embedding]["shape"])
    ]
    if len(alike) != 1:
        raise UserError(
            f"{target.folder}: expected a tensor {facts.lm_head}.weight, since {facts.name} does not "
            f"tie it to the embedding, found {len(alike)} that could be it.",
            code="target-head-missing",
            remedy="Restore the weights, or set tie_word_embeddings in config.json if they are tied.",
            facts={"class": facts.name},
        )
    return alike[0]


def _check(
    target: TargetConfig, tensors: Mapping[str, TensorInfo], name: str, shape: list[int]
) -> None:
    found = tensors.get(name)
    if found is not None and found["dtype"] not in _FLOATS:
        raise _quantized(target, name, found["dtype"])
    if found is None or list(found["shape"]) != shape:
        raise UserError(
            f"{target.folder}: expected the tensor {name} of shape {shape}, found "
            f"{None if found is None else list(found['shape'])}.",
            code="target-tensor-shape",
            remedy="config.json and the weights must be of one model: restore both.",
            facts={"tensor": name, "expected": shape},
        )


def _biased(target: TargetConfig, facts: ClassFacts) -> UserError:
    return UserError(
        f"{target.folder}: lm_head has a bias, which the losses do not know.",
        code="target-head-bias",
        remedy="Choose another target.",
        facts={"class": facts.name},
    )


def _quantized(target: TargetConfig, name: str, how: str) -> UserError:
    return UserError(
        f"{target.folder}: expected {name} in 16 or 32 bits, found {how}.",
        code="target-tensor-quantized",
        remedy="Name the 16-bit original in run.target_train: dump and train take their states and "
        "weights from it.",
        facts={"tensor": name, "dtype": how},
    )
