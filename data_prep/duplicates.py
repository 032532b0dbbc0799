"""Find duplicates over all documents: exact duplicates, and near-duplicates by MinHash LSH, band by band.

Both leave a table `node, first`: documents to drop, and the one that stays instead. A node is a document's place: the
index of its part among the sorted parts, and its row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctllm_jax.config.prepare import MinHashConfig
from data_prep.commits import Commit, Stage, Unit
from data_prep.stages.near import PLACE, band_column

if TYPE_CHECKING:
    import pyarrow as pa

    from data_prep.engine import Engine, Part

VERSION = 1
DIGEST = ("digest_high", "digest_low")
MOST_EDGES = 200_000_000
"""scipy's connected components take 24 bytes an edge."""
_KEPT_COPIES = "copies.parquet"


def exact(engine: Engine, stage: Stage, unit: Unit, parts: Sequence[Part]) -> Commit:
    """Copies of the same text: 128 bits of a hash are compared. The first by (priority, id, file, position) stays."""
    if found := stage.find(unit):
        return found
    with stage.commit(unit) as output:
        table = engine.copies(parts, key=DIGEST, order=PLACE)
        _write(output.file(_KEPT_COPIES), table.select(["node", "first"]))
        groups = Counter(dict(zip(table["first"].to_pylist(), table["group"].to_pylist(), strict=True)).values())
        output.counters |= {"copies": table.num_rows, "groups": sum(groups.values()),
                            "largest": max(groups, default=0)}
    return stage.find(unit)


def near(engine: Engine, stage: Stage, units: Sequence[Unit], key_parts: Sequence[Part], documents: Sequence[Part],
         config: MinHashConfig, *, progress: Callable[[int], None]) -> Commit:
    """Near-duplicates: documents that agree in a band, and the clusters that such pairs form.

    `units` are one for each band and, last, one for the outcome; `key_parts` hold the band keys and `documents` the
    documents themselves, in the same order. Of each cluster the first by (priority, id, file, position) stays.
    """
    *bands, last = units
    if found := stage.find(last):
        return found
    edges = np.empty((0, 2), np.int64)
    candidates = 0
    for index, unit in enumerate(bands):
        edges = _forest(np.concatenate([edges, _band(engine, stage, unit, key_parts, index)]),
                        joined=config.verify is None)
        progress(index + 1)
    candidates = len(edges)
    if config.verify is not None and len(edges):
        edges = edges[_verified(engine, documents, edges, config)]
    with stage.commit(last) as output:
        table, sizes = _clusters(engine, documents, edges)
        _write(output.file(_KEPT_COPIES), table)
        output.counters |= {"copies": table.num_rows, "candidates": candidates,
                            "verified": None if config.verify is None else len(edges),
                            "cluster_sizes": sorted(Counter(sizes).items())}
    return stage.find(last)


def read_copies(stage: Stage) -> pa.Table:
    """The table `node, first` that the last commit of a stage left."""
    import pyarrow.parquet as pq

    return pq.read_table(stage.parts / _KEPT_COPIES)


def rows_by_part(nodes: np.ndarray, parts: int) -> list[list[int]]:
    """Nodes to the rows of each part, sorted."""
    from data_prep.engine import PART_BITS

    nodes = np.sort(nodes)
    bounds = np.searchsorted(nodes, np.arange(parts + 1, dtype=np.int64) << PART_BITS)
    rows = (nodes & ((1 << PART_BITS) - 1)).tolist()
    return [rows[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]


def _band(engine: Engine, stage: Stage, unit: Unit, parts: Sequence[Part], index: int) -> np.ndarray:
    if not stage.find(unit):
        with stage.commit(unit) as output:
            edges = engine.edges(parts, key=band_column(index))
            output.counters |= {"edges": len(edges)}
            with open(output.file(f"{unit['id']}.npy"), "wb") as file:
                np.save(file, edges)
    return np.load(stage.parts / f"{unit['id']}.npy")


def _forest(edges: np.ndarray, *, joined: bool) -> np.ndarray:
    """The same clusters with fewer edges: stars if any pair suffices, else the distinct pairs."""
    if len(edges) > MOST_EDGES:
        raise MemoryError(f"{len(edges):,} candidate pairs are more than {MOST_EDGES:,}: give more rows to a band")
    if not joined or not len(edges):
        return np.unique(edges, axis=0)
    nodes, labels = _components(edges)
    first = np.full(labels.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, labels, nodes)
    stars = np.stack([first[labels], nodes], axis=1)
    return stars[stars[:, 0] != stars[:, 1]]


def _components(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nodes of these edges, sorted, and the cluster of each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes, places = np.unique(edges, return_inverse=True)
    places = places.reshape(edges.shape)
    graph = coo_array((np.ones(len(edges), np.int8), (places[:, 0], places[:, 1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    return nodes, labels


def _verified(engine: Engine, documents: Sequence[Part], edges: np.ndarray, config: MinHashConfig) -> np.ndarray:
    """bool [edges]: whether the true Jaccard similarity of the pair is at least `config.verify`."""
    similarity = engine.pairs(documents, edges, "text", Jaccard(config.shingle))
    return similarity >= config.verify


class Jaccard:
    """Measures two texts; a class, so that it can be sent to a worker with its shingle."""

    def __init__(self, shingle: int):
        self.shingle, self.__name__ = shingle, "jaccard"

    def __call__(self, left: str, right: str) -> float:
        from data_prep.dedup.minhash import jaccard

        return jaccard(left, right, self.shingle)


def _clusters(engine: Engine, documents: Sequence[Part], edges: np.ndarray) -> tuple[pa.Table, list[int]]:
    import pyarrow as pa

    empty = pa.table({"node": pa.array([], pa.int64()), "first": pa.array([], pa.int64())})
    if not len(edges):
        return empty, []
    nodes, labels = _components(edges)
    found = engine.lookup(documents, nodes, PLACE)
    order = found.append_column("label", pa.array(labels)).sort_by(
        [("label", "ascending"), ("rank", "ascending"), *((name, "ascending") for name in PLACE),
         ("node", "ascending")])
    label, node = order["label"].to_numpy(), order["node"].to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], label[1:] != label[:-1]]))
    sizes = np.diff(np.append(starts, len(label)))
    firsts = np.repeat(node[starts], sizes)
    dropped = node != firsts
    table = pa.table({"node": pa.array(node[dropped]), "first": pa.array(firsts[dropped])}).sort_by("node")
    return table, sizes.tolist()


def _write(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")


def winners(engine: Engine, documents: Sequence[Part], table: pa.Table, count: int) -> list[dict[str, Any]]:
    """A few of the dropped documents, each with the one that stayed: node, first, and both texts."""
    if not table.num_rows or not count:
        return []
    chosen = table.take(np.unique(np.linspace(0, table.num_rows - 1, count).astype(int)))
    nodes = np.unique(np.concatenate([chosen["node"].to_numpy(), chosen["first"].to_numpy()]))
    texts = {row["node"]: row for row in engine.lookup(documents, nodes, ["id", "url", "text", "source"]).to_pylist()}
    return [{"dropped": texts[row["node"]], "kept": texts[row["first"]]} for row in chosen.to_pylist()]
