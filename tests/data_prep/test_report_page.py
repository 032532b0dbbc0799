"""The page of a corpus: the funnel is checked, thresholds are drawn, and no text on it does anything."""

import copy
import re
from html.parser import HTMLParser

import pytest

from ctllm_jax.config.errors import UserError
from data_prep.report_page import funnel_problems, render, write_page

HOSTILE = ("</script></pre></textarea><img src=x onerror=alert(1)><script>alert(2)</script>"
           "'\"&amp;<!-- \x1b[31m\x00\u202e\ud800")


def funnel(source):
    """A source's rows, 1,000 records in."""
    steps = [("read", 1000, 990, 0, 10, 9.0e6, 8.9e6), ("filter", 990, 600, 390, 0, 8.9e6, 6.0e6),
             ("exact", 600, 550, 50, 0, 6.0e6, 5.4e6), ("minhash", 550, 500, 50, 0, 5.4e6, 4.9e6),
             ("lines", 500, 498, 2, 0, 4.9e6, 4.8e6), ("tokenize", 498, 498, 0, 0, 4.8e6, 4.8e6)]
    return [{"stage": stage, "source": source, "in": came, "kept": kept, "dropped": dropped, "quarantined": bad,
             "in_bytes": int(size), "kept_bytes": int(left), "cpu_seconds": 2.0}
            for stage, came, kept, dropped, bad, size, left in steps]


def rule(source, name, *, failed, **values):
    counts = [0] * 20
    counts[3], counts[15] = 990 - failed, failed
    return {"source": source, "name": name, "code": "S2", "version": 1, "doc": f"What {name} is.\n\nMore of it.",
            "low": None, "high": 0.6, "measured": 990, "failed": failed, "only": failed // 2,
            "edges": [index / 20 for index in range(21)], "counts": counts, **values}


def sample(source, text, **values):
    return {"source": source, "stage": "filter", "rule": None, "kept": False, "id": f"{source}#{text[:5]}", "url": None,
            "text": text, "value": None, "other": None, **values}


@pytest.fixture
def report():
    """A report of two sources, with everything in it."""
    found = {
        "version": 1, "output": "corpora/small", "command": "launch.py prepare configs/data/small.yaml",
        "mode": "statistics", "writes_punctuation": False, "limit": None, "config": {"minhash": {"bands": 9}},
        "seconds": {"read": 2.0, "filter": 6.0, "clusters": 1.0, "clean": 1.0},
        "cpu_seconds": {"read": 3.0, "filter": 12.0}, "peak_memory": 512_000_000,
        "encodings": {"utf-8": 1900, "gb18030": 80}, "left_out": {"record of type request": 990},
        "inputs": [{"source": "web", "file": "/data/a.warc.gz", "kind": "warc", "encoding": None, "text_field": None,
                    "records": 990, "bytes": 4_000_000, "quarantined": 10, "sample": {"text": "一个网页"}},
                   {"source": "wiki", "file": "/data/b.jsonl.zst", "kind": "jsonl", "compression": "zst",
                    "encoding": "utf-8", "text_field": "content", "records": 990, "bytes": 3_000_000, "quarantined": 10,
                    "sample": None}],
        "funnel": funnel("web") + funnel("wiki"),
        "rule_sets": [{"source": "web", "name": "web", "left_out": {"word_length": "it is <slow>"}},
                      {"source": "wiki", "name": "encyclopedia", "left_out": {}}],
        "rules": [rule("web", "length", failed=300, low=0.1, high=0.725), rule("web", "digit_fraction", failed=0),
                  rule("web", "bullets", failed=40), rule("wiki", "length", failed=2)],
        "removed": {"web": {"links": 41, "lines_javascript": 12}, "wiki": {"links": 0}},
        "samples": [sample("web", "太短的文", rule="length", value=4),
                    sample("web", "都是数字", rule="bullets", value=0.75),
                    sample("web", "太短的文", rule="bullets", value=0.9),
                    sample("web", "什么也不剩", rule="empty"),
                    sample("web", "留下来的文章", kept=True),
                    sample("web", "完全一样的文章", stage="exact", other="完全一样的文章"),
                    sample("wiki", "几乎一样的甲文章", stage="minhash", other="几乎一样的乙文章"),
                    sample("web", "被去掉的一行", stage="lines", other="被留下的一行"),
                    sample("wiki", "考试题", stage="decontamination", value=3, other="下列说法正确的一项")],
        "languages": [{"source": "web", "language": "zh", "documents": 900, "bytes": 8_000_000},
                      {"source": "web", "language": "en", "documents": 90, "bytes": 900_000}],
        "exact": {"groups": 20, "largest": 7},
        "minhash": {"permutations": 128, "bands": 9, "rows": 13, "shingle": 13, "verify": 0.8, "candidates": 240,
                    "verified": 198, "curve": [[step / 10, (step / 10) ** 8] for step in range(11)],
                    "cluster_sizes": [[2, 48], [7, 3]], "too_short": 9},
        "lines": {"documents": 38, "lines": 91, "characters": 4120},
        "decontamination": {"ngrams": 184_220, "documents": 4},
        "datasets": [{"source": "web", "split": "train", "documents": 490, "tokens": 1_200_000,
                      "text_bytes": 4_680_000, "shards": 1}]}
    return found


class Page(HTMLParser):
    """Elements and text of a page; fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in {"meta", "link", "br", "hr", "img", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def read(report):
    """The page of a report, which must be inert: one script, ours; nothing fetched; no attribute that runs."""
    html = render(report)
    page = Page(html)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1 and tags.count("style") == 1
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(tags)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "action", "xlink:href", "srcset"):
            assert attributes.get(name) in (None, "data:,"), (tag, attributes)
    assert "@import" not in html and "url(" not in html and "default-src &#x27;none&#x27;" in html
    return html, page


def test_a_whole_report_is_shown(report):
    html, page = read(report)
    for text in ("Corpus corpora/small", "launch.py prepare", "every rule was measured",
                 "punctuation is written unchanged", "996", "49.8% of 2,000 read", "9.60MB", "1.20M",
                 "3.90 bytes each", "512MB", "10s", "1.8 MB/s", "all sources", "checked in all 12 rows",
                 "/data/a.warc.gz", "jsonl zst", "gb18030 80", "一个网页", "content", "rule set encyclopedia",
                 "it is <slow>", "What length is.", "≥ 0.1 and ≤ 0.725", "30.3%", "150", "rules that dropped nothing",
                 "太短的文", "什么也不剩", "留下来的文章", "lines javascript", "4,120 characters",
                 "20 texts occur more than once", "198 of them verified with Jaccard ≥ 0.8", "9 bands × 13 rows",
                 "half are found at 1", "被去掉的一行", "被留下的一行", "考试题", "下列说法正确的一项",
                 "4 documents hold passages of the evaluation sets (184,220", "900", "8.00MB", "1,200,000",
                 "record of type request", "clean1.0s–9.8–", '"bands": 9'):
        assert text in page.text, text
    assert "More of it" not in page.text and 'class="problems"' not in html


@pytest.mark.parametrize(("changes", "words"), [
    ({}, ["every rule was measured on every document", "punctuation is written unchanged"]),
    ({"mode": "production", "writes_punctuation": True, "limit": 1000},
     ["stops at the first rule that it fails", "punctuation is written as ASCII", "the first 1,000 records"])])
def test_the_head_says_how_it_was_made(report, changes, words):
    text = read({**report, **changes})[1].text
    for word in words:
        assert word in text
    assert ("a trial" in text) == ("limit" in changes)


@pytest.mark.parametrize(("stage", "key", "value", "problems"), [
    ("filter", "dropped", 389, ["web, filter: 990 came in, but kept, dropped and quarantined are 989"]),
    ("read", "quarantined", 11, ["web, read: 1,000 came in, but kept, dropped and quarantined are 1,001"]),
    ("filter", "kept", 601, ["web, filter: 990 came in, but kept, dropped and quarantined are 991",
                             "web: filter kept 601, but 600 came into exact"]),
])
def test_a_funnel_that_does_not_add_up_is_told_first(report, stage, key, value, problems):
    assert funnel_problems(report) == []
    row = next(row for row in report["funnel"] if row["stage"] == stage)
    row[key] = value
    assert funnel_problems(report) == problems
    html, page = read(report)
    assert html.index(problems[0]) < html.index("<h2>Funnel")
    assert f"{len(problems)} rows do not add up" in page.text and "checked in all" not in page.text


def test_every_rule_has_its_histogram_with_its_thresholds(report):
    html, _ = read(report)
    bounds = re.findall(r'data-bound="(\w+) ([\d.]+)"', html)
    # Each is drawn over counts and over their logarithms.
    assert bounds.count(("low", "0.1")) == 2 and bounds.count(("high", "0.725")) == 2
    assert bounds.count(("high", "0.6")) == 6
    assert len(re.findall('<svg [^>]*data-counts="linear"', html)) == 4
    assert html.count('class="bars cut"') == 2 * 3


def test_a_dropped_document_is_shown_once_with_its_value(report):
    html, page = read(report)
    for text in ("太短的文", "都是数字", "什么也不剩"):
        assert html.count(f'<p dir="auto">{text}</p>') == 1
    assert "dropped: 40 of 990; 1 of those chosen are shown above" in page.text
    assert "<b>4</b> · web#太短的文" in html and "<b>0.750</b>" in html


def test_copies_show_what_differs(report):
    html, page = read(report)
    assert html.count('<p dir="auto">完全一样的文章</p>') == 1
    assert "几乎一样的<mark>甲</mark>文章" in html and "几乎一样的<mark>乙</mark>文章" in html


def hostile(value):
    """The same report with every text replaced, and one more entry, of a hostile name, in every mapping."""
    if isinstance(value, dict):
        found = {key: hostile(item) for key, item in value.items()}
        return found | ({HOSTILE: next(iter(found.values()))} if found else {})
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_text_is_shown_and_does_nothing(report):
    html, page = read(hostile(report))
    assert page.text.count("<img src=x onerror=alert(1)>") > 20
    assert not re.search("[\x00\x1b\u202e\ud800-\udfff]", html)
    # Samples go where their stage and rule say, so these keep both.
    for entry in report["samples"]:
        entry |= {key: HOSTILE for key in ("id", "url", "text", "other") if entry[key] is not None}
    html, page = read(report)
    assert page.text.count("<img src=x onerror=alert(1)>") >= 10


def test_any_part_may_be_missing_or_null(report):
    assert "Corpus" in read({})[1].text
    for key in report:
        without = {name: value for name, value in report.items() if name != key}
        assert read(without)[0] == read({**report, key: None})[0], key
    for key, value in report.items():
        if isinstance(value, list):
            read({**report, key: []})
            for field in {name for row in value for name in row}:
                rows = copy.deepcopy(value)
                for row in rows:
                    row[field] = None
                read({**report, key: rows})
        elif isinstance(value, dict):
            read({**report, key: {}})
            for field in value:
                read({**report, key: {**value, field: None}})


def test_the_page_is_written_whole(report, tmp_path):
    path = write_page(report, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == render(report)
    assert [found.name for found in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match="a directory"):
        write_page(report, tmp_path)
