# SPDX-License-Identifier: Apache-2.0
"""The connector behind vLLM's own classes of model runner V2, which CUDA uses and a CPU does not.

Real: the resolved configuration, the scheduler's and the worker's side of the connector, the draft
"model" with its cache layer, the speculator's `propose`, and `ActiveKVConnector`. Made here: the
states that a target would give, the block tables, and the order of a step's calls.
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from safetensors.torch import load_file

from stages.dump.backends.vllm import connector
from stages.dump.backends.vllm.setup import VllmSettings
from tests.engine.dump.capturing import AUX_LAYERS, MAX_LENGTH_TOKENS, settings
from tests.engine.process_group import single_process_group
from tests.models import tiny_llama

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(Version(vllm.__version__) < Version("0.32"), reason="V2 was another then"),
]
NUM_PAGES = 24
NUM_STATES = len(AUX_LAYERS) + 1


@dataclasses.dataclass
class Runner:
    """What a worker of V2 has around the connector."""

    config: Any
    scheduler: connector.HiddenStatesConnector
    active: Any
    speculator: Any
    cache: torch.Tensor
    block_size: int

    def step(
        self, chunks: dict[str, tuple[list[int], int, torch.Tensor]], *, is_forward: bool = True
    ) -> set[str]:
        """One step: `chunks` is request -> (its pages, first position, states [n, A+1, H]).

        Returns:
            the requests whose pages the engine may reuse from now on.
        """
        metadata = self.scheduler.build_connector_meta(SimpleNamespace())
        output = SimpleNamespace(
            kv_connector_metadata=metadata, has_sync_kv_loads=False, finished_req_ids=set()
        )
        if not is_forward:
            result = self.active.no_forward(output).kv_connector_output
            return set((result and result.finished_sending) or ())
        self.active.pre_forward(output)
        if chunks:
            self._propose(chunks)
        self.active.finish_forward()
        return set(self.active.post_forward(set()).finished_sending or ())

    def _propose(self, chunks: dict[str, tuple[list[int], int, torch.Tensor]]) -> None:
        slots = torch.cat(
            [
                torch.tensor(pages)[positions // self.block_size] * self.block_size
                + positions % self.block_size
                for pages, start, states in chunks.values()
                for positions in [torch.arange(start, start + len(states))]
            ]
        )
        states = torch.cat([states for _, _, states in chunks.values()])
        batch = SimpleNamespace(
            idx_mapping=torch.arange(len(chunks)),
            is_padding=torch.zeros(len(states), dtype=torch.bool),
        )
        (layer,) = self.speculator.draft_attn_layer_names
        unused = torch.zeros(1)
        with torch.inference_mode():
            self.speculator.propose(
                batch,
                {layer: None},
                {layer: slots},
                unused,
                list(states.unbind(1)),
                *[unused] * 2,
                last_sampled=torch.zeros(len(chunks), 1, dtype=torch.long),
                next_prefill_tokens=unused,
                temperature=unused,
                seeds=unused,
            )

    def finish(self, path: Path, ids: list[int], pages: list[int], name: str) -> bool:
        """The scheduler's side hears that a request is done; True: its pages must stay."""
        request = SimpleNamespace(
            request_id=name,
            kv_transfer_params={connector.WRITE_TO: str(path)},
            prompt_token_ids=ids,
            num_prompt_tokens=len(ids),
            num_computed_tokens=len(ids),
        )
        must_stay, _ = self.scheduler.request_finished_all_groups(request, (pages,))
        return must_stay


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    from vllm.distributed import kv_transfer
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.model_executor.models.extract_hidden_states import ExtractHiddenStatesModel
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector
    from vllm.v1.worker.gpu.spec_decode.extract_hidden_states import ExtractHiddenStatesSpeculator

    folder = tmp_path_factory.mktemp("target")
    target = tiny_llama(folder, max_length_tokens=MAX_LENGTH_TOKENS)
    config = VllmSettings(**settings(target), max_num_batched_tokens=512).resolve()
    with single_process_group(config):
        model = ExtractHiddenStatesModel(vllm_config=config, prefix="draft")
        ((name, layer),) = config.compilation_config.static_forward_context.items()
        spec = layer.get_kv_cache_spec(config)
        shape = (NUM_PAGES, spec.num_kv_heads, spec.block_size, spec.head_size)
        cache = layer.kv_cache = torch.zeros(shape, dtype=spec.dtype)
        groups = [KVCacheGroupSpec(layer_names=[name], kv_cache_spec=spec)]
        cache_config = KVCacheConfig(NUM_PAGES, [], groups)
        scheduler = connector.HiddenStatesConnector(config, KVConnectorRole.SCHEDULER, cache_config)
        kv_transfer.ensure_kv_transfer_initialized(config, cache_config)
        speculator = ExtractHiddenStatesSpeculator(config, torch.device("cpu"))
        speculator.model, speculator.draft_attn_layer_names = model, {name}
        yield Runner(
            config,
            scheduler,
            ActiveKVConnector(config, {name: cache}),
            speculator,
            cache,
            spec.block_size,
        )
        kv_transfer.ensure_kv_transfer_shutdown()


def states(runner: Runner, num_tokens: int, seed: int) -> torch.Tensor:
    size = runner.config.model_config.get_hidden_size()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, NUM_STATES, size, generator=generator).to(runner.cache.dtype)


def written(path: Path) -> dict[str, torch.Tensor]:
    """The file, which a thread of the connector's writes."""
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return load_file(path)


def test_this_is_the_runner_that_cuda_uses(runner: Runner) -> None:
    assert type(runner.active.kv_connector) is connector.HiddenStatesConnector
    assert runner.speculator.num_hidden_states == NUM_STATES
    assert not runner.cache.any()


def test_chunks_of_two_requests_arrive_whole_and_their_pages_are_zeroed(
    runner: Runner, tmp_path: Path
) -> None:
    """A prompt of three pages in two chunks, beside a short one; a third goes on meanwhile."""
    size = runner.block_size
    long, short, other = (
        states(runner, length, seed) for seed, length in enumerate((2 * size + 3, 5, size))
    )
    long_pages, short_pages, other_pages = [7, 3, 11], [2], [9]
    half = size + 2
    assert not runner.step({"long": (long_pages, 0, long[:half]), "short": (short_pages, 0, short)})
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("long", "short")}
    ids = {"long": list(range(len(long))), "short": list(range(5))}
    assert runner.finish(paths["short"], ids["short"], short_pages, "short")
    released = runner.step(
        {"long": (long_pages, half, long[half:]), "other": (other_pages, 0, other)}
    )
    assert released == {"short"}
    assert not runner.cache[short_pages].any()
    assert runner.finish(paths["long"], ids["long"], long_pages, "long")
    # Nothing is left to compute: an empty step still hands the states over.
    assert runner.step({}, is_forward=False) == {"long"}
    assert not runner.cache[long_pages].any()
    for name, expected in (("long", long), ("short", short)):
        found = written(paths[name])
        assert found["token_ids"].tolist() == ids[name]
        assert torch.equal(found["hidden_states"], expected.to(torch.bfloat16))
        assert int(found["filled"]) == len(expected)
    kept = runner.cache[other_pages[0]].transpose(0, 1)
    assert torch.equal(kept, other), "a request that goes on was not touched"
    runner.cache[other_pages] = 0


def test_a_page_is_reused_by_the_very_next_request(runner: Runner, tmp_path: Path) -> None:
    first, second = states(runner, 4, 5), states(runner, 3, 6)
    paths = [tmp_path / f"{index}.safetensors" for index in range(2)]
    runner.step({"first": ([5], 0, first)})
    assert runner.finish(paths[0], [1, 2, 3, 4], [5], "first")
    # In V2 a step's reads come before or after its writes, by the release; the page is another one.
    assert runner.step({"second": ([6], 0, second)}) == {"first"}
    assert runner.finish(paths[1], [1, 2, 3], [6], "second")
    assert runner.step({"third": ([5], 0, second)}) == {"second"}
    assert torch.equal(written(paths[0])["hidden_states"], first.to(torch.bfloat16))
    assert torch.equal(written(paths[1])["hidden_states"], second.to(torch.bfloat16))
    assert torch.equal(runner.cache[5].transpose(0, 1)[:3], second)
    assert not runner.cache[5].transpose(0, 1)[3:].any(), "nothing of the first request is left"
    runner.cache[5] = 0


def test_an_aborted_request_keeps_nothing(runner: Runner, tmp_path: Path) -> None:
    request = SimpleNamespace(
        request_id="aborted",
        kv_transfer_params={connector.WRITE_TO: str(tmp_path / "aborted.safetensors")},
        prompt_token_ids=[1, 2, 3],
        num_prompt_tokens=3,
        num_computed_tokens=2,
    )
    assert runner.scheduler.request_finished_all_groups(request, ([4],)) == (False, None)
    assert runner.step({}, is_forward=False) == set()
