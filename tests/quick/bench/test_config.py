# SPDX-License-Identifier: Apache-2.0
"""What a section `bench` is refused for."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.errors import UserError
from shared.settings import build
from stages.bench.config import BenchConfig
from stages.synth.config import SynthConfig

SECRET = "hunter2"
ADDRESSES = (f"http://user:{SECRET}@127.0.0.1:9", f"http://127.0.0.1:9/v1?api_key={SECRET}")


@pytest.mark.parametrize("url", [*ADDRESSES, [ADDRESSES[0]], {"url": ADDRESSES[0]}])
def test_an_address_with_a_secret_is_refused_and_not_repeated(url: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    bench: dict[str, Any] = {"endpoint": "http://127.0.0.1:8", "baseline_endpoint": url}
    sections = {"run": {"target": "t"}, "bench": bench, "synth": {"prompts": "p", "endpoints": url}}
    recipe.write_text(yaml.safe_dump(sections))
    for config, key in ((BenchConfig, "BASELINE_ENDPOINT"), (SynthConfig, "ENDPOINT")):
        with pytest.raises(UserError, match=rf"\$EYRIE_{key}_KEY") as refused:
            build(config, {"recipe": str(recipe)})
        assert refused.value.code == "setting-invalid"
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "options", "owner"),
    [
        ("speculative_args", {"model": "/other"}, "bench.head"),
        ("speculative_args", {"method": "ngram"}, "EAGLE-3 heads"),
        ("speculative_args", {"method": "draft_model"}, "EAGLE-3 heads"),
        ("speculative_args", {"revision": "v2"}, "bench.head_revision"),
        ("speculative_args", {"num-speculative-tokens": 7}, "bench.num_speculative_tokens"),
        ("speculative_args", {"num_speculative_tokens_per_batch_size": [[1, 8, 1]]}, "every batch"),
        ("speculative_args", {"parallel_drafting": False}, "config.json"),
        ("speculative_args", {"max_model_len": 70}, "drafts zeros"),
        ("speculative_args", {"draft_model_config": {}}, "vLLM itself"),
        ("engine_args", {"model": "/other"}, "run.target"),
        ("engine_args", {"model_weights": "/other"}, "run.target"),
        ("engine_args", {"--revision": "v2"}, "run.target_revision"),
        ("engine_args", {"no-trust-remote-code": True}, "run.trust_remote_code"),
        ("engine_args", {"dtype": "float32"}, "bench.dtype"),
        ("engine_args", {"-tp": 2}, "bench.tensor_parallel_size"),
        ("engine_args", {"max-model-len": 70}, "the longest row"),
        ("engine_args", {"max-model": 70}, "the longest row"),
        ("engine_args", {"dt": "float32"}, "bench.dtype"),
        ("engine_args", {"config": "options.yaml"}, "the recipe"),
        ("engine_args", {"served_model_name": "x"}, "asks the server"),
        ("engine_args", {"speculative_config": '{"model": "/other"}'}, "bench.head"),
        ("engine_args", {"speculative-config.model": "/other"}, "bench.head"),
        ("engine_args", {"spec_model": "/other"}, "bench.head"),
        ("engine_args", {"sc": {"model": "/other"}}, "bench.head"),
    ],
)
def test_an_option_that_would_measure_something_else_is_refused(
    key: str, options: dict[str, Any], owner: str
) -> None:
    """The report would name the run's head, its K and its target all the same."""
    (name,) = options
    told = rf"bench\.{key}: expected no option .* found {name}.* set by .*{owner}"
    with pytest.raises(UserError, match=told) as refused:
        build(BenchConfig, {"target": "t", key: json.dumps(options)})
    assert refused.value.code == "setting-invalid"


def test_vllms_other_options_are_free() -> None:
    speculative = {"rejection_sample_method": "block", "method": "eagle3"}
    engine = {"quantization": "fp8", "max_num_seqs": 8, "model_impl": "transformers", "seed": 7}
    flags = {"speculative_args": json.dumps(speculative), "engine_args": json.dumps(engine)}
    config = build(BenchConfig, {"target": "t", **flags})
    assert (config.speculative_args, config.engine_args) == (speculative, engine)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            {"num_speculative_tokens": "1", "min_acceptance_length": "2.1"},
            "min_acceptance_length: expected at most 2, .* found 2.1",
        ),
        (
            {"num_speculative_tokens": "[1,3]", "min_acceptance_length": "2.5"},
            "num_speculative_tokens: 1 can give",
        ),
        ({"min_acceptance_length": "9"}, "expected at most 4, .* found 9"),
        (
            {"compare_ngram": "true", "min_gain_over_ngram": "3.5"},
            "min_gain_over_ngram: expected at most 3, .* found 3.5",
        ),
    ],
)
def test_a_gate_that_no_head_can_meet_is_refused(flags: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        build(BenchConfig, {"target": "t", **flags})


def test_a_gate_that_a_perfect_head_meets_is_taken() -> None:
    flags = {"num_speculative_tokens": "[1,3]", "min_acceptance_length": "2"}
    flags |= {"compare_ngram": "true", "min_gain_over_ngram": "1"}
    assert build(BenchConfig, {"target": "t", **flags}).min_acceptance_length == 2


@pytest.mark.parametrize(("depths", "gate"), [("1", 0), ("[1,3]", 0), ("2", 2.1), ("[3,1]", 2.1)])
def test_the_gate_that_nobody_set_is_none_where_no_head_can_meet_it(
    depths: str, gate: float
) -> None:
    config = build(BenchConfig, {"target": "t", "num_speculative_tokens": depths})
    assert config.min_acceptance_length == gate
    assert config.identity()["bench.min_acceptance_length"] == gate


@pytest.mark.parametrize("name", ["max_num_seqs", "max-num-seqs", "--max-num-seqs"])
def test_an_option_is_the_same_in_every_spelling(name: str) -> None:
    config = build(BenchConfig, {"target": "t", "engine_args": f"{{{name}: 2}}"})
    assert config.engine_args == {"max_num_seqs": 2}
    assert config.engine_options == {"max-num-seqs": 2}


def test_the_engines_batch_is_that_of_each_engine() -> None:
    flags = {"target": "t", "engine_args": "{max_num_seqs: 4, data_parallel_size: 2}"}
    assert build(BenchConfig, {**flags, "concurrency": "8"}).concurrency == (8,)
    with pytest.raises(UserError, match=r"concurrency 9 .* at a load of 8"):
        build(BenchConfig, {**flags, "concurrency": "9"})


@pytest.mark.parametrize(
    "option", ["max_num_seqs: 2", "max-num-seqs: 2", "--max-num-seqs: 2", "max_num_seqs: '2'"]
)
def test_a_load_above_the_engines_batch_is_refused(option: str) -> None:
    flags = {"target": "t", "engine_args": f"{{{option}}}"}
    with pytest.raises(UserError, match="max_num_seqs 2 holds fewer requests than concurrency 6"):
        build(BenchConfig, {**flags, "concurrency": "[1,6]"})
    assert build(BenchConfig, {**flags, "concurrency": "[1,2]"}).concurrency == (1, 2)
    running = {**flags, "concurrency": "6", "endpoint": "http://127.0.0.1:8000"}
    assert build(BenchConfig, running).concurrency == (6,)


def test_an_answer_of_one_token_measures_nothing() -> None:
    with pytest.raises(
        UserError, match=r"bench\.max_tokens: expected 2 or more: .* found \[1, 64\]"
    ):
        build(BenchConfig, {"target": "t", "max_tokens": "[1,64]"})
