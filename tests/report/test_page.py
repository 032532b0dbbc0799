"""The page: complete, self-contained, and deaf to whatever text it shows."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from rich.console import Console

from ctllm_jax.cli.report import run as command
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.report import ReportConfig
from ctllm_jax.report.page import write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = ("</script></pre></textarea><img src=x onerror=alert(1)><script>alert(2)</script>"
           "'\"&amp;<!-- \x1b[31m\x00\u202e")


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
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def page_of(tmp_path, *directories):
    html = write_report(directories, tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def assert_inert(page, html):
    """One script, ours; nothing fetched; no attribute that runs."""
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not {"img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "action", "xlink:href", "srcset"):
            assert attributes.get(name) in (None, "data:,"), (tag, attributes)
    assert "@import" not in html and "url(" not in html


def test_a_whole_run(finished, tmp_path):
    html, page = page_of(tmp_path, finished)
    assert_inert(page, html)
    for text in ("quickstart", "done", "final loss", "32.8M", "step 2,000 of 2,000", "MFU 38.2% causal, 43.1% full",
                 "11,534,848", "mean of the last 20 records, steps 1,810 to 2,000",
                 "Training loss", "Bits per byte", "Learning rate", "Gradient norm", "Throughput", "Data wait",
                 "xz -9e 2.930", "3-gram 2.410", "compile", "1m23s", "not bit for bit", "resumed at step 1,000",
                 "今天", "hidden_size", "implementations.attention", "resumed once",
                 "what all steps take of each source", "1.32"):
        assert text in page.text, text
    assert html.count('class="restart"') == 24
    marks = [tag for tag, _ in page.elements].count("mark")
    assert marks == 20


def test_hostile_text_is_shown_and_does_nothing(writer, tmp_path):
    made = writer("<b>run", sources=(HOSTILE,), seed=0)
    made.config["model"][HOSTILE] = HOSTILE
    made.start()
    made.train(0, 100)
    made.evaluate(100)
    made.sample(100, prompt=HOSTILE, text=HOSTILE + "后")
    made.sample(100, prompt="lone", text="surrogate \ud800 \udfff")
    made.line("warning", message=HOSTILE)
    made.line("request", step=HOSTILE, what=HOSTILE)
    made.line("stage", name=HOSTILE, seconds=1.0)
    made.line("baseline", name=HOSTILE, sources={HOSTILE: {"bits_per_byte": 2.0}})
    made.line("checkpoint", step=HOSTILE, seconds=HOSTILE)
    made.line("end", step=HOSTILE, reason=HOSTILE)
    (made.directory / "config.yaml").write_text(HOSTILE, encoding="utf-8")
    (made.directory / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}), encoding="utf-8")
    other = writer("other", seed=1)
    other.start()
    for directories in ([made.directory], [made.directory, other.directory]):
        html, page = page_of(tmp_path, *directories)
        assert_inert(page, html)
        assert "<img src=x onerror=alert(1)>" in page.text
        assert "后" in page.text
        assert not re.search("[\x00\x1b\u202e\ud800-\udfff]", html)


def test_a_prompt_that_the_text_repeats_is_shown_once(writer, tmp_path):
    made = writer()
    made.start()
    made.sample(10, prompt="今天", text="今天天气")
    made.sample(20, prompt="今天", text="天气")
    html, _ = page_of(tmp_path, made.directory)
    assert html.count("<mark>今天</mark>天气</p>") == 2


def test_every_source_of_a_mixture_has_its_chart(writer, tmp_path):
    made = writer(sources=("zh_cc", "zh_books", "en"))
    made.start()
    made.train(0, 2000)
    html, page = page_of(tmp_path, made.directory)
    assert_inert(page, html)
    for name in ("zh_cc", "zh_books", "en"):
        assert f"Bits per byte, held out · {name}" in page.text


def test_runs_compared(finished, writer, tmp_path):
    other = writer("wide", seed=1, optimizer__lr=3e-3)
    other.start()
    other.train(0, 1000)
    html, page = page_of(tmp_path, finished, other.directory)
    assert_inert(page, html)
    assert "2 runs compared" in page.text and "no end recorded" in page.text
    assert re.search(r"<code>optimizer\.lr</code></td><td><code>0\.001</code></td><td><code>0\.003</code>", html)
    assert "optimizer.schedule" not in page.text.split("keys that differ")[1].split("What it wrote")[0]
    loss = html.split("<b>Training loss</b>")[1].split("</figure>")[0]
    assert 'class="line mean c0"' in loss and 'class="line mean c1"' in loss
    names = re.findall(r'<li class="c(\d)"><i></i>(\w+)', loss)
    assert names == [("0", "quickstart"), ("1", "wide")]
    assert html.count("<td>xz -9e</td>") == 1


@pytest.mark.parametrize("lines", [
    [],
    ['{"event":"start","time":1,"step":0}'],
    ['{"event":"train","time":1,"step":1,"loss":null}'],
    ['{"event":"train","time":1,"step":1,"loss":NaN,"lr":"x","grad_norm":1e999,"tokens_per_second":true}'],
    ['{"event":"train","time":1e300,"step":1}'],
    ['{"event":"evaluation","time":1,"step":1,"sources":{}}'],
    ['{"event":"evaluation","time":1,"step":1,"sources":{"zh":{"loss":null,"bits_per_byte":-1}}}'],
    ['{"event":"baseline","time":1,"name":null,"sources":{"zh":{"bits_per_byte":0}}}'],
    ['{"event":"sample","time":1,"step":1}'],
    ['{"event":"stage","time":1}'],
    ['{"event":"end","time":1}'],
])
def test_a_run_with_hardly_anything_still_has_a_page(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    html, page = page_of(tmp_path, tmp_path)
    assert_inert(page, html)
    assert "nan" not in page.text.lower()


def test_losses_that_were_not_finite_are_told(writer, tmp_path):
    made = writer()
    made.start()
    made.train(0, 100)
    made.line("train", step=110, tokens=1, loss=None, nonfinite={"loss": "nan"})
    _, page = page_of(tmp_path, made.directory)
    assert "1 not finite (step 110)" in page.text
    assert re.search(r"final loss\s*not finite", page.text)


def test_the_page_replaces_its_forerunner_and_leaves_nothing_else(finished, tmp_path):
    output = tmp_path / "out" / "report.html"
    for _ in range(2):
        assert write_report([finished], output) == output
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_what_cannot_be_compared_or_written(finished, tmp_path):
    with pytest.raises(UserError, match="given twice"):
        write_report([finished, finished / ".." / finished.name], tmp_path / "r.html")
    with pytest.raises(UserError, match="a directory; the report is a file"):
        write_report([finished], tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([finished], tmp_path / "file" / "r.html")
    with pytest.raises(UserError, match="at least one"):
        write_report([], tmp_path / "r.html")


def context(*targets, dry_run=False, **config):
    return SimpleNamespace(action=None, targets=[str(target) for target in targets], config=ReportConfig(**config),
                           console=Console(quiet=True), dry_run=dry_run)


def test_the_command_writes_into_the_run_or_here_for_several(finished, writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = writer("other").directory
    assert command(context(finished, dry_run=True)) == 0 and not (finished / "report.html").exists()
    assert command(context(finished)) == 0 and (finished / "report.html").exists()
    assert command(context(finished, other)) == 0 and (tmp_path / "report.html").exists()
    assert command(context(finished, output="x/y.html")) == 0 and (tmp_path / "x" / "y.html").exists()
    with pytest.raises(UserError, match="needs a run directory"):
        command(context())
