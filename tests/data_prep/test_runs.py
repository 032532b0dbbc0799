"""Runs of tokenized documents: any number gives the same shards, with few open files and every byte read once."""

import os

import numpy as np
import pytest

from data_prep import runs, tokenize
from data_prep.commits import Commit, open_stage
from data_prep.pipeline import prepare
from data_prep.runs import INDEX, Run
from data_prep.stages.common import options_of
from data_prep.train_tokenizer import fit
from tests.data_prep.corpus import config, document, tree, write_corpus

EOD = 2


def write_run(folder, name, keys, draw):
    """A run of documents with these keys, of 0 to 9 ids each."""
    index = np.empty(len(keys), INDEX)
    index["key"], index["split"] = np.sort(keys), draw.integers(0, 2**63, len(keys), np.uint64) * 2
    index["tokens"], index["text_bytes"] = draw.integers(0, 10, len(keys)), draw.integers(1, 30, len(keys))
    np.save(folder / f"{name}.npy", index)
    ids = draw.integers(3, 500, int(index["tokens"].sum())).astype(np.uint16)
    ids.tofile(folder / f"{name}.ids")
    ends = np.cumsum(index["tokens"])
    return [(row, ids[end - row["tokens"]:end].tolist()) for row, end in zip(index, ends, strict=True)]


@pytest.fixture
def parts(tmp_path):
    """40 runs, some of them empty, with keys in common: their names, and (row, ids) of all documents in order."""
    draw = np.random.default_rng(0)
    (tmp_path / "tokenized").mkdir()
    names, found = [], []
    for place in range(40):
        keys = draw.choice(np.arange(1, 400, dtype=np.uint64) * 2**55 // 4, size=0 if place == 7 else 6, replace=False)
        names.append(f"p{place:02d}.npy")
        found += write_run(tmp_path / "tokenized", names[-1][:-4], keys, draw)
    return names, sorted(found, key=lambda document: int(document[0]["key"]))


class Counted:
    """Files of ids that are opened, how many at once, and the bytes of them that are read."""

    def __init__(self, monkeypatch):
        self.opened = self.most = self.read = 0
        self.now = set()
        real_open, real_close, real_pread = os.open, os.close, os.pread

        def counted_open(path, *arguments, **more):
            file = real_open(path, *arguments, **more)
            if str(path).endswith(".ids"):
                self.opened += 1
                self.now.add(file)
                self.most = max(self.most, len(self.now))
            return file

        def counted_close(file):
            self.now.discard(file)
            real_close(file)

        def counted_pread(*arguments):
            data = real_pread(*arguments)
            self.read += len(data)
            return data

        monkeypatch.setattr(os, "open", counted_open)
        monkeypatch.setattr(os, "close", counted_close)
        monkeypatch.setattr(os, "pread", counted_pread)


def pack_all(tmp_path, names, shards, made="packed"):
    """The shards of these runs: bytes by name, and the locations that were planned."""
    options = config(tmp_path, shards=shards, record_tokens=16, validation_fraction=0.1)
    stage = open_stage(tmp_path / made)
    planned = tokenize.plan_shards(names, "content", options, "a")
    for unit in planned:
        tokenize.pack(unit, options_of(options, stage, dtype="uint16", eod_id=EOD, tokenized=str(tmp_path)))
    return {path.name: path.read_bytes() for path in stage.parts.iterdir()}, planned


@pytest.mark.parametrize("shards", [1, 5])
def test_merging_first_gives_the_shards_of_the_parts(tmp_path, parts, monkeypatch, shards):
    names = [tmp_path / "tokenized" / name for name in parts[0]]
    expected, _ = pack_all(tmp_path, names, shards)
    monkeypatch.setattr(runs, "MOST", 3)
    counted = Counted(monkeypatch)
    done = [({"id": name[:-4], "source": "a"}, Commit(name, name, {}, {})) for name in parts[0]]
    stage, folder, level = open_stage(tmp_path / "merge"), tmp_path / "tokenized", 0
    while units := tokenize.plan_merges(done, folder, level):
        for unit in units:
            tokenize.merge(unit, options_of(config(tmp_path), stage, dtype="uint16"))
        done, folder, level = [(unit, stage.find(unit)) for unit in units], stage.parts, level + 1
    assert level == 3 and len(done) == 2  # 40, 14, 5, 2
    merged = [folder / f"{unit['id']}.npy" for unit, _ in done]
    found, planned = pack_all(tmp_path, merged, shards, "from_merged")
    assert found == expected and len(found) == shards + 1
    # Each level reads every document once, and so do the shards, whatever their number: nothing grows with both.
    size = sum((tmp_path / "tokenized" / name).with_suffix(".ids").stat().st_size for name in parts[0])
    assert counted.read == (level + 1) * size
    assert counted.most == 3 and not counted.now
    # A commit flushes each file that it made: 14 + 5 + 2 of them.
    assert counted.opened <= 40 + 14 + 5 + 2 * (shards + 1) + 21


def test_a_shard_of_too_many_runs_merges_them_itself(tmp_path, parts, monkeypatch):
    names, documents = parts
    monkeypatch.setattr(runs, "MOST", 3)
    stage = open_stage(tmp_path / "packed")
    options = options_of(config(tmp_path, record_tokens=16), stage, dtype="uint16", eod_id=EOD,
                         tokenized=str(tmp_path / "tokenized"))
    unit = {"id": "a-train.array_record-00000-of-00001", "split": "train", "limit": 0, "low": 0, "high": 2**64,
            "location": names}
    counts = tokenize.pack(unit, options)
    assert counts["documents"] == len(documents)
    assert counts["tokens"] == sum(len(ids) + 1 for _, ids in documents)
    assert [path.name for path in stage.parts.iterdir()] == [unit["id"]]


def test_documents_come_in_the_order_of_their_keys_and_then_of_the_runs(tmp_path, parts):
    names, documents = parts
    own = [Run(name) for name in names]
    merged = runs.merged(tmp_path / "tokenized", own)
    found = list(runs.read_ids(tmp_path / "tokenized", own, merged, dtype="uint16"))
    assert [ids.tolist() for ids in found] == [ids for _, ids in documents]
    assert merged.index.tolist() == [row.tolist() for row, _ in documents]


def test_the_pipeline_merges_what_cannot_be_open_at_once(tmp_path, monkeypatch):
    write_corpus(tmp_path / "raw", documents=20, files=7)
    (tmp_path / "t.model").write_bytes(fit([document(seed) for seed in range(9)], vocab_size=500,
                                           character_coverage=1.0))
    changes = {"rules": "none", "minhash": {"enabled": False}, "tokenizer": str(tmp_path / "t.model"), "shards": 3}
    plain = config(tmp_path, output=str(tmp_path / "plain"), **changes)
    prepare(plain)
    monkeypatch.setattr(runs, "MOST", 2)
    many = config(tmp_path, **changes)
    prepare(many)
    assert tree(tmp_path / "out", "text") == tree(tmp_path / "plain", "text")
    assert not prepare(many).worked
    assert sorted(path.name for path in (tmp_path / "out/stages/merge/parts").glob("*.npy")) == [
        f"text-level-{level}-{place:05d}.npy" for level, count in ((0, 4), (1, 2)) for place in range(count)]
    monkeypatch.setattr(runs, "MOST", 56)
    assert not prepare(many).worked and not (tmp_path / "out/stages/merge").exists()
