"""Damaged records: what stands in for them is the same for whoever reads, and nothing else changes."""

import pickle

import numpy as np
import pytest

from ctllm_jax.data.packing import PackedRows
from ctllm_jax.dataset.damage import DamagedShard, DamageLog
from ctllm_jax.dataset.reader import Dataset

from .conftest import EOD, R


def damage_record(directory, index, shard=0):
    """Flip a byte of the file so that this record of a shard, and no other that was readable, is not."""
    path = Dataset(directory).split("train").shards[shard].path
    data, before = path.read_bytes(), unreadable(directory, shard)
    for at in range(64, len(data), 8):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])
        if unreadable(directory, shard) == {*before, index}:
            return
    raise AssertionError(f"no byte is of record {index} alone")


def unreadable(directory, shard):
    reader, bad = Dataset(directory).split("train").shards[shard], set()
    for index in range(reader.shard.records):
        try:
            reader.record(index)
        except DamagedShard:
            bad.add(index)
    return bad


def open_shard(directory, log, shard=0):
    return Dataset(directory).split("train", damage=log).shards[shard]


@pytest.mark.parametrize("index", range(5))
def test_the_next_record_that_can_be_read_stands_in(directory, tmp_path, index):
    """The first shard has 66 tokens: four records of 16, and one of 2."""
    whole = Dataset(directory).split("train").shards[0]
    records = [whole.record(number) for number in range(5)]
    assert [record.num_tokens for record in records] == [16, 16, 16, 16, 2]
    damage_record(directory, index)
    log = DamageLog(tmp_path / "damaged", budget=1)
    reader = open_shard(directory, log)
    # The last one is too short to stand in for another.
    other = {0: 1, 1: 2, 2: 3, 3: 0, 4: 0}[index]
    length = records[index].num_tokens
    expected = np.concatenate([(records[other] if number == index else record).tokens[:record.num_tokens]
                               for number, record in enumerate(records)])
    window = reader.window(0, 1000)
    np.testing.assert_array_equal(window.tokens, expected)
    # Documents end where they did, and where the stand-in begins and ends.
    ends = {number * R + end for number, record in enumerate(records)
            for end in (records[other].ends if number == index else record.ends) if end <= record.num_tokens}
    seams = {index * R, index * R + length} - {0}
    assert window.ends.tolist() == sorted(ends | seams)
    # Any window is a part of that, whoever reads it, and whatever was read before.
    fresh = pickle.loads(pickle.dumps(open_shard(directory, log)))
    for start in range(66):
        for size in (1, 5, R, R + 1, 40):
            part = fresh.window(start, size)
            assert part.tokens.tolist() == expected[start:start + size].tolist()
            # At its last token's end a window need not know that a stand-in begins there: it has no target for it.
            stop = min(start + size, 66)
            assert [end for end in part.ends.tolist() if end < size] == [
                end - start for end in window.ends.tolist() if start < end < start + size]
            assert set(part.ends.tolist()) <= {end - start for end in window.ends.tolist() if end <= stop}
    (entry,) = log.read()
    assert (entry["shard"], entry["record"], entry["replaced_by"]) == (str(reader.path), index, other)


def test_no_loss_and_no_attention_across_a_seam(directory, tmp_path):
    damage_record(directory, 1)
    rows = PackedRows(Dataset(directory).split("train", damage=DamageLog(tmp_path / "damaged", budget=1)), 2 * R,
                      isolate_documents=True, mask_eod=True)
    row = rows[0]
    assert row.loss_weights[R - 1] == 0 and row.loss_weights[2 * R - 1] == 0
    assert row.segment_ids[R] == row.segment_ids[R - 1] + 1 and row.positions[R] == 0
    assert row.tokens[R - 1] != EOD  # else it would have been so without damage


@pytest.mark.parametrize("seed", range(4))
def test_bytes_flipped_anywhere(directory, tmp_path, seed):
    """Whatever is hit: two readers agree, and what they could not read is told, or the shard cannot be opened."""
    draw = np.random.default_rng(seed)
    path = Dataset(directory).split("train").shards[0].path
    data = bytearray(path.read_bytes())
    for at in draw.integers(0, len(data), size=3):
        data[at] ^= 1 << int(draw.integers(8))
    path.write_bytes(data)
    wanted = []
    for name in ("one", "other"):
        log = DamageLog(tmp_path / name, budget=10)
        try:
            window = open_shard(directory, log).window(0, 1000)
            wanted.append((window.tokens.tolist(), window.ends.tolist(), log.read()))
        except DamagedShard as error:
            wanted.append(str(error))
            assert str(path) in str(error)
    assert wanted[0] == wanted[1]


def test_a_budget_is_of_the_whole_run(directory, tmp_path):
    for index in (1, 2):
        damage_record(directory, index)
    damage_record(directory, 0, shard=1)
    log = DamageLog(tmp_path / "damaged", budget=2)
    assert len(open_shard(directory, log).window(0, 1000).tokens) == 66
    # Another process, after a restart: what it met before counts once.
    again = pickle.loads(pickle.dumps(log))
    assert len(open_shard(directory, again).window(0, 1000).tokens) == 66 and len(again.read()) == 2
    shard = open_shard(directory, again, shard=1)
    with pytest.raises(DamagedShard, match=r"00001-of-00002: record 0 cannot be read .*3 damaged records in this run, "
                                           r"more than data\.damaged_budget=2"):
        shard.window(0, 5)


def test_a_shard_without_a_readable_record_raises(directory, tmp_path):
    for index in range(5):
        damage_record(directory, index)
    with pytest.raises(DamagedShard, match="record 0 cannot be read"):
        open_shard(directory, DamageLog(tmp_path / "damaged", budget=10)).window(0, 1)


def test_every_missing_or_changed_shard_is_named_at_once(directory):
    first, second = (shard.path for shard in Dataset(directory).split("train").shards)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(DamagedShard, match=f"(?s){first} is missing\n  {second} is truncated"):
        Dataset(directory).split("train")
