# SPDX-License-Identifier: Apache-2.0
"""Several sources as one stream of prompts: shuffled, mixed, without duplicates, shared out.

The stream is the same in every process and on every run, so that a resumed or a sharded run sees the
same rows. Beside the shuffle's buffer it holds two hashes a row, about 160 bytes.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

from shared.prompts.rows import BadRow, Prompt, short_hash
from shared.prompts.sources import Duplicates, digest, read_source
from stages.synth.config import SynthConfig, SynthSource

Row = Prompt | BadRow


def input_hashes(config: SynthConfig) -> dict[str, str]:
    """A hash of each source's content, for the fingerprint."""
    return {
        source.name: digest(source, config.workspace, label="synth.prompts")
        for source in config.all_sources
    }


def prompts(config: SynthConfig) -> Iterator[Row]:
    """Every row that is this process's to account for, in a fixed order.

    A duplicate comes as a `BadRow` with the reason duplicate_id or duplicate_content.

    Raises:
        UserError: a source cannot be read.
    """
    sources = config.all_sources
    duplicates = Duplicates(same_content=config.deduplicate)
    streams = [_stream(source, config, duplicates) for source in sources]
    if any(source.weight is not None for source in sources):
        rows = _weighted(streams, [source.weight or 1.0 for source in sources])
    else:
        rows = _interleaved(streams)
    limited, share = _at_most(rows, config.max_samples), config.share
    # Rows are dealt out by position, so that every process's share is of one size.
    return itertools.islice(limited, share.index, None, share.count)


def _stream(source: SynthSource, config: SynthConfig, duplicates: Duplicates) -> Iterator[Row]:
    rows = read_source(source, config.workspace, label="synth.prompts")
    if len(config.sources) > 1:  # two data sets may both count from 0
        rows = (_named_after(row, source.name) for row in rows)
    if config.shuffle:
        rows = _shuffled(rows, config.shuffle_buffer_rows, seed=f"{config.run.seed}/{source.name}")
    return _at_most(duplicates.marked(rows), source.max_samples)


def _named_after(row: Row, source: str) -> Row:
    if isinstance(row, Prompt):
        return replace(row, sample_id=f"{source}:{row.sample_id}")
    return replace(row, row=f"{source}: {row.row}")


def _shuffled(rows: Iterator[Row], buffer_rows: int, *, seed: str) -> Iterator[Row]:
    """A full buffer gives a random row of it for each that comes in."""
    chance = random.Random(seed)
    buffer = list(itertools.islice(rows, buffer_rows))
    for row in rows:
        index = chance.randrange(len(buffer))
        yield buffer[index]
        buffer[index] = row
    chance.shuffle(buffer)
    yield from buffer


def _at_most(rows: Iterator[Row], limit: int | None) -> Iterator[Row]:
    """Up to `limit` prompts; rows that are none do not count, those after the last are not read."""
    if limit is None:
        yield from rows
        return
    taken = 0
    while taken < limit and (row := next(rows, None)) is not None:
        taken += isinstance(row, Prompt)
        yield row


def _interleaved(streams: list[Iterator[Row]]) -> Iterator[Row]:
    """One row from each in turn, until all are empty."""
    for group in itertools.zip_longest(*streams):
        yield from (row for row in group if row is not None)


def _weighted(streams: list[Iterator[Row]], weights: list[float]) -> Iterator[Row]:
    """Prompts in proportion to the weights, until one stream has no more.

    Worked example: weights 9 and 1 over 100 prompts each give 100 of the first and 11 of the second.
    """
    taken = [0] * len(streams)
    while True:
        # The stream that is furthest behind its share comes next.
        index = min(range(len(streams)), key=lambda i: ((taken[i] + 1) / weights[i], i))
        for row in streams[index]:
            yield row
            if isinstance(row, Prompt):
                taken[index] += 1
                break
        else:
            return


def sampling_of(config: SynthConfig, sample_id: str) -> tuple[float, float]:
    """Temperature and top_p of a row: the same however often and in whatever order it is asked."""
    ways = config.all_sampling
    chance = random.Random(f"{config.run.seed}/{sample_id}")
    way = chance.choices(ways, [each.weight for each in ways])[0]
    return way.temperature, way.top_p


def request_seed(config: SynthConfig, sample_id: str, turn: int) -> int:
    """The engine's seed for one answer (31 bits): rows with equal prompts still differ."""
    return short_hash(f"{config.run.seed}/{sample_id}/{turn}") % 2**31
