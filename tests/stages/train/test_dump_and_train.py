# SPDX-License-Identifier: Apache-2.0
"""dump (transformers' engine) and train as processes: what they write, export and refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.contracts import hidden_states, vocab
from tests.runs import run
from tests.stages.train.trainings import TRAIN, losses, weights


def test_dump_writes_what_it_says(dumped: Path) -> None:
    folder = dumped / "run" / "dump"
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["counts"] == {"in": 40, "ok": 40, "skipped": {}, "failed": {}}
    assert facts["facts"]["agreement"] > 0.95
    shards = sorted(folder.glob("shard_*.pt"))
    assert len(shards) > 3
    read = [hidden_states.read_shard(path, num_states=4, hidden_size=128) for path in shards]
    assert [name for shard in read for name in shard.sample_ids] == [
        f"row-{i:03d}" for i in range(40)
    ]
    counts = torch.load(folder / hidden_states.TOKEN_FREQ, weights_only=True)
    assert int(counts.sum()) == 40 * 24  # answers alone


def test_training_learns_and_says_so(trained: Path) -> None:
    folder = trained / "run" / "train"
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    curve = list(losses(trained).values())
    walks = [r["walked_acceptance_length"] for r in history if "walked_acceptance_length" in r]
    facts = json.loads((folder / "manifest.json").read_text())["facts"]
    assert curve[-1] < 0.8 * curve[0]
    assert facts["walked_acceptance_length"] == max(walks)
    assert facts["steps"] == history[-1]["step"]


def test_another_dtype_exports_again_and_trains_nothing(trained: Path, workspace: Path) -> None:
    shutil.rmtree(workspace)
    shutil.copytree(trained, workspace)
    before = weights(workspace)
    checkpoints = workspace / "run" / "train" / "checkpoints"
    times = {path: path.stat().st_mtime_ns for path in checkpoints.iterdir()}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        done = run(workspace, "train", "--export_dtype", name)
        assert done.returncode == 0, done.stderr
        assert {tensor.dtype for tensor in weights(workspace).values()} >= {dtype}
    assert all(torch.equal(before[name], after) for name, after in weights(workspace).items())
    assert {path: path.stat().st_mtime_ns for path in checkpoints.iterdir()} == times


def test_a_warm_start_takes_weights_and_vocabulary_over(trained: Path, workspace: Path) -> None:
    shutil.copytree(trained / "run" / "export", workspace / "head")
    warm = ("--init_from", "head", "--epochs", "1", "--learning_rate", "1e-12")
    done = run(workspace, "train", *warm, "--export_dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    before, after = weights(trained), weights(workspace)
    assert all(torch.equal(before[name], after[name]) for name in before)
    manifest = json.loads((workspace / "run" / "train" / "manifest.json").read_text())
    assert "input.init_from" in manifest["identity"]
    refused = run(workspace, "train", *warm, "--draft_vocab_size", "64", "--name", "run")
    assert refused.returncode == 2
    assert "draft_vocab_size" in refused.stderr


def test_any_checkpoint_is_exported_in_either_layout(trained: Path) -> None:
    for layout, extra in (("hf", []), ("speculators", ["--output", str(trained / "theirs")])):
        done = run(trained, "train", "export", "--format", layout, *extra)
        assert done.returncode == 0, done.stderr
    ours = load_file(trained / "run" / "export-hf" / "model.safetensors")
    assert all(torch.equal(weights(trained)[name], ours[name]) for name in ours)
    theirs = load_file(trained / "theirs" / "model.safetensors")
    assert {name.replace("layers.0.", "midlayer.") for name in theirs} == ours.keys()
    for folder in ("export", "export-hf"):
        assert "the local model tiny" in (trained / "run" / folder / "README.md").read_text()
    missing = run(trained, "train", "export", "--checkpoint", str(trained / "none.pt"))
    assert missing.returncode == 2
    assert "expected a checkpoint at" in missing.stderr


def test_an_export_is_of_the_head_that_was_trained(workspace: Path) -> None:
    """No tensor shows a window or the loss: both come from the training, whatever the recipe says."""
    done = run(workspace, "train", "--epochs", "1", "--draft_window", "32", "--loss", "tv")
    assert done.returncode == 0, done.stderr
    trained = json.loads((workspace / "run" / "export" / "config.json").read_text())
    assert trained["sliding_window"] == 32
    for given, named in (
        (("--draft_window", "64"), "train.draft_window 32, not 64"),
        (("--aux_layers", "1,2,3"), "run.aux_layers None, not [1, 2, 3]"),
        (("--reasoning", "disable"), "run.reasoning 'keep', not 'disable'"),
    ):
        refused = run(workspace, "train", "export", *given)
        assert refused.returncode == 2 and named in refused.stderr, refused.stderr
        assert "[export-settings]" in refused.stderr
    assert not (workspace / "run" / "export-hf").exists()
    other = ("--loss", "lk", "--target", str(workspace / "tiny"))
    done = run(workspace, "train", "export", "--walk_tokens", "5", *other)
    assert done.returncode == 0, done.stderr
    told = [
        "run.target 'tiny', not ",
        f"train.epochs 1, not {TRAIN['epochs']}",
        "train.loss 'tv', not",
    ]
    assert "as it was trained, not as given: " in done.stderr
    assert all(each in done.stderr for each in told)
    exported = workspace / "run" / "export-hf"
    assert json.loads((exported / "config.json").read_text()) == trained
    card = (exported / "README.md").read_text()
    assert '"num_speculative_tokens": 5' in card and '"train.loss": "tv"' in card


def test_an_export_needs_its_training_and_the_head_that_it_began_with(
    trained: Path, workspace: Path
) -> None:
    missing = run(workspace, "train", "export")
    assert missing.returncode == 2 and "[training-missing]" in missing.stderr, missing.stderr
    shutil.copytree(trained / "run" / "export", workspace / "head")
    done = run(workspace, "train", "--init_from", "head", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    done = run(workspace, "train", "export")  # init_from is the training's
    assert done.returncode == 0, done.stderr
    path = workspace / "head" / "config.json"
    path.write_text(path.read_text() + "\n")
    refused = run(workspace, "train", "export")
    assert refused.returncode == 2 and "[export-init-from-changed]" in refused.stderr
    identity = workspace / "run" / "train" / "identity.json"
    identity.write_text(identity.read_text().replace('"muon"', '"lion"'))
    damaged = run(workspace, "train", "export")
    assert damaged.returncode == 2 and "[training-identity]" in damaged.stderr, damaged.stderr


def test_an_export_does_not_replace_what_is_none(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused = run(trained, "train", "export", "--output", str(tmp_path))
    assert refused.returncode == 2, refused.stderr
    assert "[export-folder-taken]" in refused.stderr
    assert f"at {tmp_path}, found notes.txt" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_trackers_get_losses_and_walks(workspace: Path) -> None:
    done = run(workspace, "train", "--epochs", "1", "--trackers", "tensorboard")
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (workspace / "run" / "train" / "trackers").rglob("events.out.tfevents.*")
    tracked = EventAccumulator(str(events)).Reload()
    names = {"loss", "accuracy_0", "walked_acceptance_length"}
    assert names <= set(tracked.Tags()["scalars"])
    history = (workspace / "run" / "train" / "history.jsonl").read_text().splitlines()
    first = json.loads(history[0])
    assert tracked.Scalars("loss")[0].step == first["step"]
    assert tracked.Scalars("loss")[0].value == pytest.approx(first["loss"])


def test_more_layers_than_one_are_refused_with_the_reason(workspace: Path) -> None:
    done = run(workspace, "train", "--num_layers", "2")
    assert done.returncode == 2
    assert "a draft head has one layer" in done.stderr


def test_a_tied_target_gives_a_head_of_its_own(trained: Path) -> None:
    """The shrunk lm_head of a tied target is no alias of the embedding, and is saved."""
    config = json.loads((trained / "run" / "export" / "config.json").read_text())
    target = json.loads((trained / "tiny" / "config.json").read_text())
    assert target["tie_word_embeddings"] is True
    assert config["tie_word_embeddings"] is False
    assert weights(trained)["lm_head.weight"].shape == (128, 128)
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]


def test_vocab_is_made_of_this_dump_and_used_by_train(workspace: Path) -> None:
    folder = workspace / "run" / "train"
    others = vocab.from_token_ids(torch.arange(128), 512)  # as of an earlier dump
    vocab.write(folder, others)
    assert run(workspace, "train", "vocab").returncode == 0
    before = (folder / "d2t.npy").read_bytes()
    assert not torch.equal(vocab.read(folder).d2t, others.d2t)
    vocab.write(folder, others)
    done = run(workspace, "train", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert (folder / "d2t.npy").read_bytes() == before
    ids = weights(workspace)["d2t"] + torch.arange(128)
    assert torch.equal(ids, weights(workspace)["t2d"].nonzero().flatten())


def test_a_changed_setting_over_finished_work_is_refused(trained: Path) -> None:
    before = weights(trained)
    done = run(trained, "train", "--learning_rate", "5e-4")
    assert done.returncode == 2
    assert "train.learning_rate: was 0.001, now 0.0005" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trained).items())


def test_a_target_that_changed_since_is_refused(workspace: Path) -> None:
    weights_file = workspace / "tiny" / "model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[-1] ^= 0xFF
    weights_file.write_bytes(data)
    for stage in ("dump", "train"):
        done = run(workspace, stage)
        assert done.returncode == 2
        assert "target-changed]" in done.stderr


def test_other_aux_layers_than_dumped_are_refused(workspace: Path) -> None:
    done = run(workspace, "train", "--aux_layers", "1,2,3")
    assert done.returncode == 2
    assert "run.aux_layers" in done.stderr


def test_a_loss_that_is_no_number_stops_with_exit_3_and_names_the_samples(workspace: Path) -> None:
    done = run(workspace, "train", "--learning_rate", "1e30")
    assert done.returncode == 3, done.stderr
    assert "the loss is" in done.stderr
    assert "row-0" in done.stderr
