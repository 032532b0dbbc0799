"""Rows from a stream of documents, against a reading of the stream token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.packing import PackedRows, pack_row
from ctllm_jax.dataset.manifest import Manifest, Split, TokenizerIdentity
from ctllm_jax.dataset.reader import SplitReader, Window
from ctllm_jax.dataset.writer import ShardWriter, shard_name

EOD = 9


def write_split(directory, streams, record_tokens):
    """A split with a shard for each list of documents."""
    shards = []
    for index, documents in enumerate(streams):
        writer = ShardWriter(directory / shard_name("t", "train", index, len(streams)), record_tokens=record_tokens,
                             dtype="uint16", eod_id=EOD)
        for document in documents:
            writer.add(np.asarray(document, np.uint16), text_bytes=len(document))
        shards.append(writer.close())
    manifest = Manifest(name="t", record_tokens=record_tokens, dtype="uint16", eod_id=EOD, config_sha256="",
                        created_by="", tokenizer=TokenizerIdentity("", "", 10), splits={"train": Split(tuple(shards))})
    return SplitReader(directory, manifest, "train")


def expected_rows(streams, length, *, isolate, mask_eod):
    """The rows as plain lists, one token at a time."""
    rows = []
    for documents in streams:
        stream = [(token, number) for number, document in enumerate(documents) for token in [*document, EOD]]
        ends = {sum(len(document) + 1 for document in documents[:number + 1]) - 1 for number in range(len(documents))}
        for start in range(0, len(stream), length):
            row, segment, position = [], 0, 0
            for place in range(start, start + length):
                if place >= len(stream):
                    row.append((0, 0, 0.0, 0, 0))
                    continue
                new = place == start or (isolate and stream[place][1] != stream[place - 1][1])
                segment, position = (segment + 1, 0) if new else (segment, position + 1)
                has_target = place + 1 < len(stream)
                weight = float(has_target and not (mask_eod and place in ends))
                row.append((stream[place][0], stream[place + 1][0] if has_target else 0, weight, segment, position))
            rows.append(list(zip(*row, strict=True)))
    return rows


documents = st.lists(st.lists(st.integers(0, 8), max_size=30), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(streams=st.lists(documents, min_size=1, max_size=3), isolate=st.booleans(), mask_eod=st.booleans(),
       lengths=st.sampled_from([(8, 8), (8, 4), (8, 1), (8, 24), (5, 10)]))
def test_rows_are_the_stream(tmp_path_factory, streams, lengths, isolate, mask_eod):
    record_tokens, length = lengths
    split = write_split(tmp_path_factory.mktemp("split"), streams, record_tokens)
    packed = PackedRows(split, length, isolate_documents=isolate, mask_eod=mask_eod)
    wanted = expected_rows(streams, length, isolate=isolate, mask_eod=mask_eod)
    assert len(packed) == len(wanted)
    for row, values in zip((packed[index] for index in range(len(packed))), wanted, strict=True):
        for array, value in zip(row[:5], values, strict=True):
            assert array.tolist() == list(value)
        assert [array.dtype for array in row[:5]] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    # Each token is read once, and is a target once, but for the first of a shard.
    tokens = [token for index in range(len(packed)) for token in packed[index].tokens[packed[index].segment_ids > 0]]
    assert tokens == [token for stream in streams for document in stream for token in [*document, EOD]]
    if not mask_eod:
        targets = sum(int(packed[index].loss_weights.sum()) for index in range(len(packed)))
        assert targets == len(tokens) - len(streams)


def test_an_end_at_a_rows_last_token_starts_no_segment():
    row = pack_row(Window(np.array([1, 2, 3, EOD, 5]), np.array([4, 5])), 4, isolate_documents=True, mask_eod=True)
    assert row.segment_ids.tolist() == [1, 1, 1, 1]
    assert row.loss_weights.tolist() == [1, 1, 1, 0]
    assert row.targets.tolist() == [2, 3, EOD, 5]


def test_a_changed_document_changes_no_other_segment(tmp_path):
    """Isolation on the side of the data: what a document's own tokens see does not depend on its neighbors' tokens."""
    first = [[1, 2, 3], [4, 5], [6, 7, 8]]
    second = [[8, 8, 8], [4, 5], [6, 7, 8]]
    rows = []
    for name, streams in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        packed = PackedRows(write_split(tmp_path / name, [streams], 16), 16, isolate_documents=True, mask_eod=True)
        rows.append(packed[0])
    later = rows[0].segment_ids != 1
    for one, other in zip(rows[0][:5], rows[1][:5], strict=True):
        np.testing.assert_array_equal(one[later], other[later])
    assert rows[0].positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 0, 0, 0, 0, 0]
    # No target of a segment lies in another one, where EOD is masked.
    for row in rows:
        counts = row.loss_weights[:-1] > 0
        assert (row.segment_ids[:-1][counts] == row.segment_ids[1:][counts]).all()


@pytest.mark.parametrize("length", [12, 6, 3, 20])
def test_a_length_that_does_not_fit_the_records_is_refused(tmp_path, length):
    split = write_split(tmp_path, [[[1, 2, 3]]], 8)
    with pytest.raises(UserError, match=rf"sequence_length={length} neither divides nor multiplies record_tokens=8"):
        PackedRows(split, length, isolate_documents=True, mask_eod=True)


def test_a_row_outside_is_an_index_error(tmp_path):
    packed = PackedRows(write_split(tmp_path, [[[1, 2, 3]]], 8), 8, isolate_documents=True, mask_eod=True)
    with pytest.raises(IndexError):
        packed[1]
    with pytest.raises(IndexError):
        packed[-1]
