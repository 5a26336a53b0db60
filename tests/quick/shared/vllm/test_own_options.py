# SPDX-License-Identifier: Apache-2.0
"""An option of the stage's own, under every name that vLLM's parser takes for it."""

import pytest

from shared.config import SecretValueError
from shared.vllm.own_options import plain_name, refuse_own

OWN = {"max-model-len": "run.max_length_tokens", "speculative-config": "bench.head"}


@pytest.mark.parametrize(
    "name",
    ["max_model_len", "--max-model-len", "max-model", "m", "no-max-model-len", "max-model-len.x"],
)
def test_every_spelling_of_an_own_option_is_refused(name: str) -> None:
    with pytest.raises(SecretValueError, match=rf"found {name}.* set by run\.max_length_tokens"):
        refuse_own([name], OWN)


@pytest.mark.parametrize("name", ["max_num_seqs", "max-num-seqs", "--max-num-seqs"])
def test_a_name_is_plain_in_every_spelling(name: str) -> None:
    assert plain_name(name) == "max-num-seqs"


@pytest.mark.parametrize("name", ["spec_model", "spec-tok", "-sc", "spec_method.x"])
def test_an_alias_is_named_with_what_it_stands_for(name: str) -> None:
    with pytest.raises(SecretValueError, match=rf"found {name} \(speculative-config\), which"):
        refuse_own([name], OWN)


def test_other_options_pass() -> None:
    refuse_own(["max_model_len_x", "max-num-seqs", "no-enable-prefix-caching", "tp"], OWN)
