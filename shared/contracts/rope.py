# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding of a draft head: one that transformers and vLLM read alike.

In: a config.json's rotary fields, in any spelling of the hub. Out: theta and a scaling dict that
gives the same table in transformers' LlamaRotaryEmbedding and in vLLM's get_rope. A head is trained
from scratch, so it need not rotate as its target does; trainer and engine only have to agree. Types
whose table depends on the length served (longrope, dynamic), on a part of the head (proportional,
partial_rotary_factor) or on image positions (mrope) therefore become the plain type with the same
theta. A type with an unknown name is refused. A head that was trained already rotates as it does:
`not_kept` names what would change.
"""

import math
from collections.abc import Mapping
from typing import Any

_ALIASES = {
    "su": "longrope",
    "mrope": "default",
    "none": "default",
    "deepseek_yarn": "yarn",
    "telechat3-yarn": "yarn",
}
_ORIGINAL = "original_max_position_embeddings"
# These become the plain type.
_NOT_FIXED = {"default", "longrope", "dynamic", "ntk", "proportional", "xdrope", "openpangu"}
_THETA_KEYS = ("rope_theta", "rotary_emb_base", "global_rope_theta", "rope_base", "rotary_base")
# What else vLLM reads of a rope: another width, positions in an image, other frequencies.
_WIDTHS = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
_OTHERS = ("rope_dim", "mrope_section", "xdrope_section", "use_fope")
# Softmax temperature per log of the stretch: YaRN's and TeleChat's.
_YARN_COEFFICIENT, _TELECHAT_COEFFICIENT = 0.1, 0.07


def resolve_rope(raw: Mapping[str, Any], head_dim: int) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) of a head with the target config `raw`; scaling is None for the plain type.

    Worked example: {"type": "mrope", "mrope_section": [...]} with rope_theta 1e6 gives (1e6, None).

    Raises:
        ValueError, TypeError, KeyError: the type is unknown, or one of its numbers is missing.
    """
    rope = _rope_dict(raw)
    theta = _theta(raw, rope)
    named = str(rope.get("rope_type") or rope.get("type") or "default").lower()
    rope_type = _ALIASES.get(named, named)
    if rope_type == "yarn":
        scaling = _yarn(raw, rope, named)
    elif rope_type == "llama3":
        scaling = _llama3(raw, rope)
    elif rope_type == "linear":
        factor = _number(rope, "factor")
        scaling = None if factor == 1 else {"rope_type": "linear", "factor": factor}
    elif rope_type in _NOT_FIXED:
        # Hunyuan's alpha is a constant factor on theta, so the plain type has the very same table.
        alpha = _number(rope, "alpha", 1.0)
        theta, scaling = theta * alpha ** (head_dim / max(head_dim - 2, 1)), None
    else:
        raise ValueError(f"the unknown rope type {named!r}")
    return theta, scaling


def not_kept(raw: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """What a head's config.json states of its rope and `resolve_rope` changes; empty for the same table.

    Worked example: {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1024} with 4096
    positions gives those two numbers and the 4096: vLLM's table would have 2048 rows, so it becomes plain.

    Raises:
        ValueError, TypeError, KeyError: as `resolve_rope`.
    """
    _, scaling = resolve_rope(raw, head_dim)
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    stated = {**raw, **rope}
    found = {key: stated[key] for key in _WIDTHS if stated.get(key) not in (None, 1)}
    found |= {key: rope[key] for key in _OTHERS if rope.get(key)}
    # vLLM's one layer takes the dict as it is, and finds no theta in it.
    found |= {key: value for key, value in rope.items() if isinstance(value, Mapping)}
    names = _names_not_kept(stated, is_plain=scaling is None)
    return found | {key: stated[key] for key in names if stated.get(key) is not None}


def _names_not_kept(stated: Mapping[str, Any], *, is_plain: bool) -> tuple[str, ...]:
    """The keys of a rope type whose table in vLLM is not the one that it is resolved to."""
    key = "rope_type" if stated.get("rope_type") else "type"
    named = str(stated.get(key) or "default").lower()
    rope_type, mscales = (
        _ALIASES.get(named, named),
        (stated.get("mscale"), stated.get("mscale_all_dim")),
    )
    names: tuple[str, ...] = ()
    if stated.get("rope_theta") is None:
        names = _THETA_KEYS[1:]  # of targets; a head's is read as `rope_theta` alone
    if rope_type == "default":
        return (*names, "alpha") if stated.get("alpha") != 1 else names
    if rope_type == "dynamic":  # transformers' depends on the length only beyond all positions
        return names if stated.get("alpha") else (*names, "max_trained_positions")
    if rope_type in _NOT_FIXED:
        return (*names, key)
    # Nothing is stretched by 1, so that the plain type has the same table.
    stretch = {stated.get("factor"), stated.get("attention_factor")}
    if rope_type == "yarn" and is_plain and stretch - {None, 1}:
        return (*names, "factor", "attention_factor", _ORIGINAL, "max_position_embeddings")
    if named == "deepseek_yarn":  # vLLM's takes an mscale alone, and no attention_factor
        return (*names, "attention_factor", *(() if all(mscales) else ("mscale", "mscale_all_dim")))
    return names


def _rope_dict(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary fields; where they are given per layer type, those of full attention."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise TypeError(f"rope parameters that are no dict: {rope!r}")
    nested = {key: value for key, value in rope.items() if isinstance(value, Mapping)}
    if not nested:
        return rope
    whole = [key for key in nested if not key.startswith(("sliding", "local", "chunked"))]
    return nested[next(iter(whole or nested))]


def _theta(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    given = [rope.get("rope_theta"), *(raw.get(key) for key in _THETA_KEYS)]
    given += [part.get("rope_theta") for part in [raw.get("rope_parameters")] if part]
    for theta in given:
        if theta is not None:
            return _positive("rope_theta", theta)
    return _class_default(str(raw.get("model_type", "")))


def _class_default(model_type: str) -> float:
    """The theta that transformers' class has where config.json leaves it out."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return 10_000.0
    theta = getattr(CONFIG_MAPPING[model_type], "default_theta", 10_000.0)
    return float(theta["global"] if isinstance(theta, Mapping) else theta)


def _yarn(raw: Mapping[str, Any], rope: Mapping[str, Any], named: str) -> dict[str, Any] | None:
    original = int(_original(raw, rope))
    longest = _positive("max_position_embeddings", raw["max_position_embeddings"])
    factor = _number(rope, "factor", longest / original)
    # vLLM's table has original * factor rows; a longer text would be read outside of it.
    if factor <= 1 or original * factor < longest:
        return None
    coefficient = _TELECHAT_COEFFICIENT if named == "telechat3-yarn" else _YARN_COEFFICIENT
    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = 1 + coefficient * math.log(factor)
    if numerator and denominator:
        attention = 1 + coefficient * float(numerator) * math.log(factor)
        attention /= 1 + coefficient * float(denominator) * math.log(factor)
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": _number(rope, "attention_factor", attention),
        "beta_fast": _number(rope, "beta_fast", 32.0),
        "beta_slow": _number(rope, "beta_slow", 1.0),
    }
    return scaling | ({} if rope.get("truncate", True) else {"truncate": False})


def _llama3(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if low >= high:
        raise ValueError(f"low_freq_factor {low} that is not below high_freq_factor {high}")
    return {
        "rope_type": "llama3",
        "factor": _number(rope, "factor"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": int(_original(raw, rope)),
    }


def _original(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> float:
    """The length before scaling. Phi-3 states it beside the dict, which transformers prefers."""
    for value in (raw.get(_ORIGINAL), rope.get(_ORIGINAL), raw["max_position_embeddings"]):
        if value is not None:
            return _positive(_ORIGINAL, value)
    raise KeyError(_ORIGINAL)


def _number(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    if rope.get(key) is None and default is not None:
        return default
    return _positive(key, rope[key])


def _positive(key: str, value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{key} {value!r}")
    return number
