"""A gigabyte of text goes through the whole pipeline in a bounded amount of memory."""

import json
import random
import resource
import sys

import pytest

from data_prep.pipeline import prepare
from data_prep.report import make_report
from data_prep.train_tokenizer import fit
from tests.data_prep.corpus import config, document, sentence

GIGABYTE = 10**9
MEMORY = 1_000_000_000
"""Of any process of a run; the README states it."""


def write_gigabyte(folder, size):
    """About `size` bytes of documents of 2 to 6 kB, a twentieth of them copies, in files of 64 MB."""
    draw = random.Random(0)
    pool = [sentence(draw, draw.randint(6, 13)) for _ in range(200_000)]
    folder.mkdir()
    written, last = 0, ""
    for number in range(10_000):
        with open(folder / f"{number:04d}.jsonl", "w", encoding="utf-8") as file:
            while file.tell() < 64_000_000 and written < size:
                text = last if last and draw.random() < 0.05 else "".join(draw.sample(pool, draw.randint(40, 110)))
                last = text
                line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
                file.write(line)
                written += len(line.encode())
        if written >= size:
            return


@pytest.mark.slow
@pytest.mark.prep
@pytest.mark.timeout(3600)
def test_a_gigabyte_stays_within_the_stated_memory(tmp_path):
    write_gigabyte(tmp_path / "raw", GIGABYTE)
    (tmp_path / "t.model").write_bytes(fit([document(seed) for seed in range(50)], vocab_size=600,
                                           character_coverage=1.0))
    options = config(tmp_path, tokenizer=str(tmp_path / "t.model"), workers=2, shards=4, record_tokens=4096)
    ran = prepare(options)
    rows = {row["stage"]: row for row in make_report(options, ran, command="test")["funnel"]}
    assert rows["read"]["in_bytes"] > 0.95 * GIGABYTE and 0.03 < rows["exact"]["dropped"] / rows["exact"]["in"] < 0.07
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stderr.write(f"\nlargest worker {ran.peak_memory / 1e6:.0f} MB, driver {driver / 1e6:.0f} MB, seconds "
                     f"{ {name: round(value, 1) for name, value in ran.seconds.items()} }\n")
    assert max(ran.peak_memory, driver) < MEMORY
