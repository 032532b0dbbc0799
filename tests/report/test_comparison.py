"""Runs compared by group: what each gave, what was reached, which is the best, and which figures do not compare."""

import re

import pytest

from ctllm_jax.report.comparison import best_value, figures_of, held_out, trained_on, unequal_held_out, unit
from ctllm_jax.report.page import write_report
from ctllm_jax.report.run import read_run


def data_of(en_rows, *, unit="rows", sha="one"):
    """What a start line says of two Chinese sources and an English one."""
    sources = {name: {"group": group, unit: rows, "tokens": 10 * rows, "learned_tokens": 4 * rows, "held_out": 5,
                      "held_out_sha256": sha} for name, group, rows in (("a", "zh", 30), ("b", "zh", 70),
                                                                        ("c", "en", en_rows))}
    groups = {"zh": {unit: 100, "tokens": 1000, "learned_tokens": 400}, "en": {unit: en_rows, "tokens": 10 * en_rows}}
    return {"sources": sources, "groups": groups, "held_out": 15}


@pytest.fixture
def tuned(writer):
    """(name, English dialogues, bits of a, b and c) -> the directory of a run that ended there."""
    def make(name, en_rows, bits, **settings):
        made = writer(name, data__ratio=name)
        made.line("start", how="init", step=0, steps=20, config=made.config, data=data_of(en_rows, **settings),
                  tokens_per_source={"a": 600, "b": 1400, "c": 20 * en_rows}, epochs=dict.fromkeys("abc", 2.0))
        for step in (10, 20):
            made.line("train", step=step, tokens=step * 100, loss=2.0)
            sources = {source: {"loss": 2 * each, "tokens": 100 * (index + 1), "bits_per_byte": each * 20 / step,
                                "bytes": 300 * (index + 1)} for index, (source, each) in enumerate(zip("abc", bits,
                                                                                                      strict=False))}
            made.line("evaluation", step=step, tokens=step * 100, sources=sources)
        made.end(20)
        return made.directory

    return make


def preferring(writer, name, margin):
    made = writer(name, optimizer__lr=margin)
    made.line("start", how="init", step=0, steps=10, config=made.config, data=data_of(40, unit="pairs"),
              tokens_per_source={"a": 60, "b": 140, "c": 40}, epochs=dict.fromkeys("abc", 1.0))
    for step in (5, 10):
        def figures(share, pairs, step=step):
            return {"loss": 0.7 - share * step, "pairs": pairs, "rewards/accuracies": share * step,
                    "rewards/margins": margin * share * step}
        made.line("train", step=step, tokens=step, **figures(0.1, 9))
        made.line("evaluation", step=step, tokens=step, **figures(0.05, 8),
                  sources={"a": figures(0.08, 2), "b": figures(0.04, 2), "c": figures(0.04, 4)})
    made.end(10)
    return made.directory


def test_sources_of_a_group_are_one(tuned):
    run = read_run(tuned("x", 50, (1.0, 2.0, 3.0)))
    assert trained_on(run) == {"zh": {"rows": 100, "tokens": 1000}, "en": {"rows": 50, "tokens": 500}}
    reached = held_out(run)
    assert reached["zh"] == pytest.approx({"loss": (2 * 100 + 4 * 200) / 300, "tokens": 300, "bytes": 900,
                                           "bits_per_byte": (1 * 300 + 2 * 600) / 900})
    assert reached["en"]["bits_per_byte"] == 3.0 and held_out(run, run.evaluation[0])["en"]["bits_per_byte"] == 6.0
    assert unit([run]) == "dialogues"


def test_text_has_a_group_for_each_source(finished):
    run = read_run(finished)
    assert trained_on(run) == {"zh": {"tokens": 2000 * 16_384}} and list(held_out(run)) == ["zh"]
    assert [(figure.key, figure.group) for figure in figures_of([run])] == [("bits_per_byte", "zh"), ("loss", "zh")]
    assert unequal_held_out([run, run]) == []


def test_the_best_is_the_lowest_loss_and_the_highest_accuracy(writer, tuned):
    runs = [read_run(tuned("x", 50, (1.0, 2.0, 3.0))), read_run(tuned("y", 25, (1.1, 2.1, 2.9)))]
    reached = [held_out(run) for run in runs]
    best = {(figure.key, figure.group): best_value(figure, reached) for figure in figures_of(runs)}
    assert best["bits_per_byte", "zh"] == reached[0]["zh"]["bits_per_byte"]
    assert best["bits_per_byte", "en"] == reached[1]["en"]["bits_per_byte"] == 2.9
    pairs = [read_run(preferring(writer, "p", 1.0)), read_run(preferring(writer, "q", 2.0))]
    figures = figures_of(pairs)
    assert [(figure.name, figure.group) for figure in figures] == [
        ("loss", ""), ("accuracy", ""), ("margin", ""), ("accuracy", "zh"), ("margin", "zh"), ("accuracy", "en"),
        ("margin", "en")]
    reached = [held_out(run) for run in pairs]
    assert reached[0][""]["rewards/margins"] == 0.5 and reached[0]["zh"]["rewards/margins"] == pytest.approx(0.6)
    values = {(figure.name, figure.group): best_value(figure, reached) for figure in figures}
    assert values["margin", ""] == 1.0 and values["accuracy", ""] is None, "equal ones have no best"


def test_unequal_held_out_data_is_told(tuned, tmp_path):
    one, other = tuned("x", 50, (1.0, 2.0, 3.0)), tuned("y", 25, (1.1, 2.1), sha="two")
    assert unequal_held_out([read_run(one), read_run(other)]) == ["a", "b", "c"]
    page = write_report([one, other], tmp_path / "r.html").read_text()
    assert "not all runs were evaluated on the same held-out data of a, b, c" in page.lower()
    same = [read_run(one), read_run(tuned("z", 25, (1.1, 2.1, 2.9)))]
    assert unequal_held_out(same) == []


def test_a_page_of_ratios_shows_rows_and_tokens_and_curves_by_group(tuned, tmp_path):
    directories = [tuned("zh-en-1-1", 100, (1.0, 2.0, 3.0)), tuned("zh-en-2-1", 50, (1.1, 2.1, 3.1))]
    page = write_report(directories, tmp_path / "r.html").read_text()
    rows = re.search(r"<h2>Runs.*?</section>", page, re.S)[0]
    assert "zh, en: dialogues and tokens of one epoch" in rows and "50 <small>500 tokens" in rows
    for group in ("zh", "en"):
        chart = page.split(f"<b>Bits per byte, held out · {group}</b>")[1].split("</figure>")[0]
        assert chart.count("<li class=") == 2
    assert "held out · a" not in page and "Held-out dialogues" in page and "<b>3.000</b>" in page
    data = re.search(r"<h2>Data.*?</section>", page, re.S)[0]
    assert "tokens an epoch" in data and "<td>zh</td>" in data


def test_pages_of_pairs_show_training_and_held_out(writer, tmp_path):
    one, other = preferring(writer, "p", 1.0), preferring(writer, "q", 2.0)
    page = write_report([one], tmp_path / "one.html").read_text()
    chart = page.split("<b>Reward accuracy</b>")[1].split("</figure>")[0]
    assert re.findall(r"<i></i>([^<]*) <output>", chart) == ["train", "held out", "held out · zh", "held out · en"]
    assert "held-out accuracy" in page and "8 pairs, margin 0.500" in page
    page = write_report([one, other], tmp_path / "two.html").read_text()
    for title in ("Reward margin, training", "Reward margin, held out", "Reward accuracy, held out · zh"):
        assert page.count(f"<b>{title}</b>") == 1
    table = re.search(r"<h2>Held-out pairs.*?</section>", page, re.S)[0]
    assert "<b>1.000</b>" in table and "accuracy zh" in table
    assert "zh, en: pairs and tokens of one epoch" in page
