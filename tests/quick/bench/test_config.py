# SPDX-License-Identifier: Apache-2.0
"""What a section `bench` is refused for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.config import build
from shared.errors import UserError
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
