# SPDX-License-Identifier: Apache-2.0
"""Files of every kind, several sources as one stream, and the shares of several processes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import UserError
from shared.prompts.rows import BadRow, Prompt
from shared.prompts.sources import Source, digest, read_source
from shared.settings import build
from stages.synth import mixture
from stages.synth.config import SynthConfig

ROWS = [{"id": f"r{i}", "prompt": f"What is {i}?"} for i in range(6)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(path: str, workspace: Path) -> list[str]:
    rows = read_source(Source(path=path), workspace)
    return [row.sample_id if isinstance(row, Prompt) else row.reason for row in rows]


def config_of(tmp_path: Path, **synth: Any) -> SynthConfig:
    recipe = {"run": {"target": "t"}, "synth": synth}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    flags = {"recipe": str(tmp_path / "recipe.yaml"), "workspace": str(tmp_path)}
    return build(SynthConfig, flags)


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    expected = [row["id"] for row in ROWS]
    write_lines(tmp_path / "a.jsonl", ROWS)
    write_lines(tmp_path / "lines.json", ROWS)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "lines.json", "list.json", "a.parquet"):
        assert ids(name, tmp_path) == expected, name


def test_folders_and_globs_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    write_lines(tmp_path / "data" / "b.jsonl", ROWS[2:4])
    write_lines(tmp_path / "data" / "a.jsonl", ROWS[:2])
    write_lines(tmp_path / "data" / "deep" / "c.jsonl", ROWS[4:])
    (tmp_path / "data" / "notes.txt").write_text("not data")
    assert ids("data", tmp_path) == ["file_not_read", *(row["id"] for row in ROWS)]
    assert ids("data/*.jsonl", tmp_path) == [row["id"] for row in ROWS[:4]]
    assert ids(str(tmp_path / "data" / "*.jsonl"), tmp_path) == [row["id"] for row in ROWS[:4]]


def test_a_row_of_a_list_or_a_table_that_is_no_prompt_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([ROWS[0], 7, {"prompt": ""}, ROWS[1]]))
    assert ids("list.json", tmp_path) == ["r0", "not_an_object", "empty_content", "r1"]


def test_files_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "list.json").write_text('[{"prompt": "a"}, {"prompt":')
    for name in ("a.parquet", "list.json", "nowhere.jsonl", "none/*.jsonl"):
        with pytest.raises(UserError) as refusal:
            ids(name, tmp_path)
        assert name.split("/")[0] in str(refusal.value)


def test_a_digest_changes_with_any_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "a.jsonl", ROWS[:2])
    write_lines(tmp_path / "data" / "b.jsonl", ROWS[2:])
    before = digest(Source(path="data"), tmp_path, label="x")
    write_lines(tmp_path / "data" / "b.jsonl", ROWS[3:])
    assert digest(Source(path="data"), tmp_path, label="x") != before


def test_weights_and_limits_of_several_sources(tmp_path: Path) -> None:
    for name in ("big", "small"):
        rows = [{"id": str(i), "prompt": f"{name} {i}"} for i in range(400)]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    sources = [{"path": "big.jsonl", "weight": 3.0}, {"path": "small.jsonl", "max_samples": 50}]
    config = config_of(tmp_path, sources=sources, max_samples=200)
    rows = [row for row in mixture.prompts(config) if isinstance(row, Prompt)]
    drawn = Counter(row.source for row in rows)
    assert drawn == {"big.jsonl": 150, "small.jsonl": 50}
    assert len({row.sample_id for row in rows}) == 200, "both count from 0, and stay apart"
    again = [row for row in mixture.prompts(config) if isinstance(row, Prompt)]
    assert again == rows


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((9.0, 1.0), (100, 11)), ((None, None), (100, 100)), ((0.5, None), (50, 100))],
)
def test_weights_are_a_proportion_also_without_limits(
    tmp_path: Path, weights: tuple[float | None, ...], expected: tuple[int, int]
) -> None:
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {i}"} for i in range(100)]
        write_lines(tmp_path / f"{name}.jsonl", [*rows[:50], rows[0], *rows[50:]])
    sources = [{"path": f"{n}.jsonl", "weight": w} for n, w in zip("ab", weights, strict=True)]
    rows = mixture.prompts(config_of(tmp_path, sources=sources))
    drawn = Counter(row.source for row in rows if isinstance(row, Prompt))
    assert (drawn["a.jsonl"], drawn["b.jsonl"]) == expected, "a duplicate does not count"


def test_shuffling_is_seeded_and_loses_nothing(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": str(i)} for i in range(100)]
    write_lines(tmp_path / "a.jsonl", rows)
    settings = {"prompts": "a.jsonl", "shuffle": True, "shuffle_buffer_rows": 10}
    order = [row.sample_id for row in mixture.prompts(config_of(tmp_path, **settings))]  # type: ignore[union-attr]
    assert order != [row["id"] for row in rows]
    assert sorted(order) == sorted(row["id"] for row in rows)
    config = config_of(tmp_path, **settings)
    assert [row.sample_id for row in mixture.prompts(config)] == order  # type: ignore[union-attr]


def test_duplicates_by_id_and_by_content(tmp_path: Path) -> None:
    rows = [*ROWS[:2], ROWS[1], {"id": "r9", "prompt": "What is 0?"}]
    write_lines(tmp_path / "a.jsonl", rows)
    found = list(mixture.prompts(config_of(tmp_path, prompts="a.jsonl")))
    assert [row.reason for row in found if isinstance(row, BadRow)] == [
        "duplicate_id",
        "duplicate_content",
    ]
    kept = list(mixture.prompts(config_of(tmp_path, prompts="a.jsonl", deduplicate=False)))
    assert [row.reason for row in kept if isinstance(row, BadRow)] == ["duplicate_id"]


def test_other_content_under_an_id_that_was_there_is_kept(tmp_path: Path) -> None:
    rows = [{"id": "p", "prompt": "q", "response": text} for text in ("a", "b", "b", "c")]
    write_lines(tmp_path / "a.jsonl", rows)
    found = list(mixture.prompts(config_of(tmp_path, prompts="a.jsonl")))
    assert [row.reason for row in found if isinstance(row, BadRow)] == ["duplicate_id"]
    names = [row.sample_id for row in found if isinstance(row, Prompt)]
    assert [name.partition("#")[0] for name in names] == ["p"] * 3
    assert len(set(names)) == 3


def test_shares_are_a_partition_of_the_rows(tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": str(i)} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
    whole = list(mixture.prompts(config_of(tmp_path, prompts="a.jsonl")))
    parts = [
        list(mixture.prompts(config_of(tmp_path, prompts="a.jsonl", num_shards=3, shard_index=i)))
        for i in range(3)
    ]
    assert [len(part) for part in parts] == [17, 17, 17]
    assert sorted(repr(row) for part in parts for row in part) == sorted(map(repr, whole))


def test_a_mix_of_sampling_is_the_same_for_a_row_however_it_is_asked(tmp_path: Path) -> None:
    ways = [{"temperature": 0.0, "weight": 1}, {"temperature": 1.0, "top_p": 0.9, "weight": 3}]
    config = config_of(tmp_path, prompts="a.jsonl", sampling=ways)
    drawn = Counter(mixture.sampling_of(config, str(i)) for i in range(1000))
    assert set(drawn) == {(0.0, 1.0), (1.0, 0.9)}
    assert 690 < drawn[(1.0, 0.9)] < 810
    assert not config.greedy
    seeds = {mixture.request_seed(config, "a", turn) for turn in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": "a", "sources": [{"path": "b"}]}, "either `prompts` or `sources`"),
        ({}, "either `prompts` or `sources`"),
        ({"sources": [{"path": "x/a"}, {"path": "y/a"}]}, "two sources are named a"),
        ({"sources": [{"path": "a", "columns": {"text": "b"}}]}, "unknown names"),
        ({"prompts": "a", "server_args": {"max_model_len": 9}}, "run.max_length_tokens"),
        ({"prompts": "a", "server_args": {"api_key": "x"}}, "environment"),
        ({"prompts": "a", "server_args": {"max-model": 9}}, "run.max_length_tokens"),
        ({"prompts": "a", "server_args": {"no-trust-remote-code": True}}, "run.trust_remote_code"),
        ({"prompts": "a", "server_args": {"config": "vllm.yaml"}}, "belong into the recipe"),
        ({"prompts": "a", "server_env": {"HF_TOKEN": "x"}}, "looks like a secret"),
        ({"prompts": "a", "temperature": 1.0, "sampling": [{}]}, "either `sampling`"),
        ({"prompts": "a", "endpoints": ["http://me:word@host"]}, r"endpoints.*ENDPOINT_KEY"),
        ({"prompts": "a", "endpoints": ["http://a", "host:8000"]}, r"expected http://host:port"),
    ],
)
def test_settings_that_contradict_themselves(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        config_of(tmp_path, **settings)


def test_a_refusal_does_not_repeat_the_secret(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        config_of(tmp_path, prompts="a", endpoints=["http://a", "http://me:word@host"])
    assert "synth.endpoints" in str(refusal.value)
    assert "word" not in str(refusal.value)


def test_an_option_that_changes_answers_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    plain = config_of(tmp_path, prompts="a")
    tuned = config_of(tmp_path, prompts="a", server_args={"gpu-memory-utilization": 0.5})
    quantized = config_of(tmp_path, prompts="a", server_args={"quantization": "fp8"})
    assert plain.identity() == tuned.identity()
    assert quantized.identity()["synth.server_args.quantization"] == "fp8"


def test_prompts_that_are_not_there_show_what_the_workspace_holds(tmp_path: Path) -> None:
    """A mistyped EYRIE_WORKSPACE is a new, empty volume: compose takes any name for one."""
    (tmp_path / "demo").mkdir()
    for number in range(9):
        (tmp_path / f"x{number}").mkdir()
    with pytest.raises(UserError) as refused:
        list(read_source(Source(path="none.jsonl"), tmp_path))
    assert f"{tmp_path} holds demo, x0, x1, x2, x3, x4, x5, x6, ...;" in refused.value.remedy
    assert "EYRIE_WORKSPACE" in refused.value.remedy
