# SPDX-License-Identifier: Apache-2.0
"""The transformers class and config of a target: what its config.json means beyond its letters.

Neither needs weights. A class that transformers has is preferred to Python code that lies beside the
weights, which runs only where the recipe trusts it.
"""

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from shared.errors import UserError
from shared.target import probe
from shared.target.model import TargetConfig
from shared.target.probe import CLASS_ERRORS, ClassFacts, UnknownRuleError

# Sizes under the names that most families use; a class maps its own names to them.
_COMMON = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def class_config(target: TargetConfig) -> PreTrainedConfig:
    """The parsed config of the whole target, or of its text part where that alone is known.

    Raises:
        UserError: no class for it, or its class does not take it.
    """
    raw = {key: value for key, value in target.whole.items() if key != "quantization_config"}
    try:
        if raw.get("model_type") in CONFIG_MAPPING:
            return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        if (own := _named_class(target)) is not None:
            return own.config_class.from_dict(raw)
        if target.model_type in CONFIG_MAPPING:  # e.g. InternVL's llm_config
            return CONFIG_MAPPING[target.model_type].from_dict(target.raw)
        if target.trust_remote_code and raw.get("auto_map"):
            config = AutoConfig.from_pretrained(target.folder, trust_remote_code=True)
            if isinstance(config, PreTrainedConfig):
                return config
    except CLASS_ERRORS as error:
        raise _refused(target, error) from error
    raise UserError(
        f"{target.folder}: transformers {transformers.__version__} has no class for the model_type "
        f"{raw.get('model_type')!r}.",
        code="target-class-unknown",
        remedy="Read the target's own Python code and set run.trust_remote_code: true."
        if raw.get("auto_map")
        else "Install a transformers that has it, or choose another target.",
        facts={"model_type": raw.get("model_type")},
    )


def model_class(target: TargetConfig, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that computes the target's logits from its tokens.

    Raises:
        UserError: there is none.
    """
    named = _named_class(target)
    if named is not None and named.config_class is type(config):
        return named
    if type(config).__module__.startswith("transformers_modules."):
        reference = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
        if reference:
            try:
                found: Any = get_class_from_dynamic_module(reference, str(target.folder))
            except CLASS_ERRORS as error:
                raise _refused(target, error) from error
            return found
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    if _text_config(target, config) is not config:
        mappings.reverse()
    for mapping in mappings:
        if type(config) in mapping:
            listed = mapping[type(config)]
            return listed[0] if isinstance(listed, tuple) else listed
    raise UserError(
        f"{target.folder}: transformers {transformers.__version__} has no class that gives "
        f"{type(config).__name__} logits.",
        code="target-class-unknown",
        remedy="Choose a target that generates text.",
        facts={"model_type": target.model_type},
    )


def loadable_class(target: TargetConfig) -> type[PreTrainedModel]:
    """The class whose `from_pretrained` loads the target.

    Raises:
        UserError: as `class_config` and `model_class`.
    """
    return model_class(target, _inner(class_config(target)))


def has_inner(target: TargetConfig, names: tuple[str, ...]) -> bool:
    """Whether the class without its lm_head, e.g. LlamaModel, has an attribute of one of the names.

    Raises:
        UserError: no class for it, or its class does not take it.
    """
    found = loadable_class(target)
    try:
        inner = probe.build(found, _inner(class_config(target))).base_model
    except CLASS_ERRORS as error:
        raise _refused(target, error) from error
    return any(hasattr(inner, name) for name in names)


def settings(target: TargetConfig) -> dict[str, Any]:
    """The text part's settings: what config.json says, and its class's own values for the rest.

    Raises:
        UserError: as `class_config`.
    """
    config = _text_config(target, _inner(class_config(target)))
    known = config.to_dict()
    known |= {name: getattr(config, name) for name in _COMMON if hasattr(config, name)}
    return known | {key: value for key, value in target.raw.items() if value is not None}


def class_facts(target: TargetConfig) -> ClassFacts:
    """What the target's class computes between its last layer and its logits.

    A vision model's text part has a class of its own in most families. Engines serve that one, so
    its rules count, and the outer class only says whether lm_head is tied.

    Raises:
        UserError: no class, or one that none of our rules describes.
    """
    config = _inner(class_config(target))
    outer = model_class(target, config)
    text = _text_config(target, config)
    try:
        if text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
            facts = probe.probe(MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], text)
            return facts.of(outer.__name__, ties=probe.ties(outer, config))
        return probe.probe(outer, config)
    except UnknownRuleError as error:
        raise UserError(
            f"{target.folder}: {outer.__name__} cannot be trained on, since {error}.",
            code="target-rule-unknown",
            remedy="Choose another target.",
            facts={"class": outer.__name__},
        ) from error
    except CLASS_ERRORS as error:
        raise _refused(target, error) from error


def _text_config(target: TargetConfig, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config's text part, which may be the config itself.

    Raises:
        UserError: its class takes no text part, and config.json has one.
    """
    try:
        found: Any = config.get_text_config(decoder=True)
        if isinstance(found, PreTrainedConfig):
            return found
        raise TypeError(f"a {type(found).__name__} as text_config")
    except CLASS_ERRORS as error:
        raise _refused(target, error) from error


def _inner(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part that answers in text, of a model that also speaks."""
    thinker = getattr(config, "thinker_config", None)
    return thinker if isinstance(thinker, PreTrainedConfig) else config


def _named_class(target: TargetConfig) -> type[PreTrainedModel] | None:
    """The class that config.json names in `architectures`, where transformers has it."""
    names = target.whole.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or not str(name).endswith(("ForCausalLM", "LMHeadModel", "Generation")):
        return None
    return found


def _refused(target: TargetConfig, error: Exception) -> UserError:
    kind = str(target.whole.get("model_type"))
    return UserError(
        f"{target.folder}/config.json: transformers' class for {kind} does not take it: "
        f"{type(error).__name__}: {str(error)[:300]}",
        code="target-config-refused",
        remedy="Restore config.json, or install the transformers version that the target needs.",
        facts={"model_type": kind},
    )
