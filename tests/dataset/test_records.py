"""A record and its bytes."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from ctllm_jax.dataset.records import Record, decode, encode


@pytest.mark.parametrize("dtype, highest", [("uint16", 65_535), ("uint32", 125_696)])
@pytest.mark.parametrize("ends", [[], [3], [1, 2, 8]])
def test_a_record_comes_back(dtype, highest, ends):
    tokens = np.array([0, 1, highest, 3, 4, 5, 6, 7], dtype)
    record = decode(encode(Record(tokens, 8, np.array(ends, np.int32))), record_tokens=8, dtype=dtype)
    np.testing.assert_array_equal(record.tokens, tokens)
    assert (record.tokens.dtype.name, record.num_tokens, record.ends.tolist()) == (dtype, 8, ends)


@pytest.mark.parametrize("count, ends, message", [
    (0, [], "0 tokens"), (9, [], "9 tokens"), (4, [5], "do not rise"), (4, [0], "do not rise"),
    (4, [3, 3], "do not rise"), (4, [3, 2], "do not rise")])
def test_offsets_outside_are_found(count, ends, message):
    data = encode(Record(np.zeros(8, np.uint16), count, np.array(ends, np.int32)))
    with pytest.raises(ValueError, match=message):
        decode(data, record_tokens=8, dtype="uint16")


def test_a_record_of_another_length_is_found():
    data = encode(Record(np.zeros(8, np.uint16), 8, np.array([], np.int32)))
    with pytest.raises(ValueError):
        decode(data, record_tokens=16, dtype="uint16")


def test_every_process_writes_the_same_bytes(repository):
    program = """
import hashlib
import numpy as np
from ctllm_jax.dataset.records import Record, encode
print(hashlib.sha256(encode(Record(np.arange(64, dtype=np.uint16), 64, np.array([3, 9], np.int32)))).hexdigest())
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=repository, stdout=subprocess.PIPE, text=True)
                 for _ in range(4)]
    written = {process.communicate(timeout=120)[0].strip() for process in processes}
    ours = encode(Record(np.arange(64, dtype=np.uint16), 64, np.array([3, 9], np.int32)))
    assert written == {hashlib.sha256(ours).hexdigest()}
