"""The whole pipeline on a small corpus: what stays, what goes, what is done again and what is not."""

import json

import pytest

from ctllm_jax.config.data import BuildConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.prepare import PrepareConfig, SourceInput
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.build import build_from_files
from data_prep.pipeline import prepare
from data_prep.report import make_report
from data_prep.train_tokenizer import fit
from tests.data_prep.corpus import clean_texts, config, document, edited, tree, write_corpus


@pytest.fixture
def corpus(tmp_path):
    """A folder with raw/, of 60 distinct documents, 6 exact and 6 near copies."""
    write_corpus(tmp_path / "raw")
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(fit([document(seed) for seed in range(50)], vocab_size=600, character_coverage=1.0))
    return str(path)


def funnel(ran, options):
    """The funnel's rows by stage."""
    return {row["stage"]: row for row in make_report(options, ran, command="test")["funnel"]}


def test_each_copy_goes_and_each_document_stays_once(corpus):
    options = config(corpus)
    rows = funnel(prepare(options), options)
    assert {stage: row["dropped"] for stage, row in rows.items()} == {
        "read": 0, "filter": 0, "exact": 6, "minhash": 6, "lines": 0}
    kept = clean_texts(corpus / "out")
    # Of copies the lowest id stays, whatever file it is in.
    assert sorted(kept) == [f"d{index:04d}" for index in range(60)]
    assert [kept[f"d{index:04d}"] for index in range(60)] == [document(index) for index in range(60)]


def test_a_second_run_changes_nothing(corpus, tokenizer):
    options = config(corpus, tokenizer=tokenizer)
    assert prepare(options).worked
    before = {path: path.stat().st_mtime_ns for path in (corpus / "out").rglob("*") if path.is_file()}
    assert not prepare(options).worked
    assert before == {path: path.stat().st_mtime_ns for path in (corpus / "out").rglob("*") if path.is_file()}


def test_a_new_file_is_the_only_one_read_and_filtered(corpus):
    prepare(config(corpus))
    (corpus / "raw/new.jsonl").write_text(json.dumps({"id": "new", "text": document(5000)}, ensure_ascii=False))
    stages = {name: set((corpus / "out/stages" / name / "commits").iterdir()) for name in ("read", "filter")}
    times = {path: path.stat().st_mtime_ns for paths in stages.values() for path in paths}
    prepare(config(corpus))
    assert "new" in clean_texts(corpus / "out") and len(clean_texts(corpus / "out")) == 61
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_removed_file_is_gone_from_the_result(corpus):
    prepare(config(corpus))
    (corpus / "raw/0.jsonl").unlink()
    prepare(config(corpus))
    prepare(config(corpus, output=str(corpus / "fresh")))
    assert tree(corpus / "out", "clean", "stages/filter/parts") == tree(corpus / "fresh", "clean",
                                                                        "stages/filter/parts")


@pytest.mark.parametrize(("change", "again"), [
    ({"filter": {"thresholds": {"web": {"length": {"low": 51}}}}}, {"filter"}),
    ({"minhash": {"bands": 14, "rows": 8}}, {"minhash", "clusters"}),
    ({"lines": {"max_distance": 0.2}}, {"clean"}),
    ({"seed": 7}, {"tokenize", "pack"}),
    ({"record_tokens": 128}, {"pack"}),
    ({"max_bad": 5, "minhash": {"implementation": "numpy"}}, set()),
])
def test_a_changed_key_runs_its_stage_again_and_only_what_follows_from_it(corpus, tokenizer, change, again):
    prepare(config(corpus, tokenizer=tokenizer))
    records = {path: path.stat().st_mtime_ns for path in (corpus / "out/stages").glob("*/commits/*")}
    prepare(config(corpus, tokenizer=tokenizer, **change))
    # Some follow-up stages find the same parts as before, and are not run: their keys say so.
    redone = {path.parts[-3] for path in (corpus / "out/stages").glob("*/commits/*")
              if path.stat().st_mtime_ns != records.get(path)}
    assert again <= redone and not redone & {"read"} and (again or not redone)


def test_a_changed_key_gives_what_a_fresh_run_gives(corpus, tokenizer):
    prepare(config(corpus, tokenizer=tokenizer))
    change = {"filter": {"thresholds": {"web": {"length": {"low": 800}}}}, "seed": 3}
    prepare(config(corpus, tokenizer=tokenizer, **change))
    prepare(config(corpus, tokenizer=tokenizer, output=str(corpus / "fresh"), **change))
    assert tree(corpus / "out", "clean", "text") == tree(corpus / "fresh", "clean", "text")
    assert 10 < len(clean_texts(corpus / "out")) < 60


def test_the_dataset_is_the_one_that_a_single_process_builds(corpus, tokenizer):
    options = config(corpus, tokenizer=tokenizer, rules="none", shards=3, minhash={"enabled": False},
                     lines={"enabled": False})
    prepare(options)
    single = BuildConfig(input=[str(corpus / "raw")], output=str(corpus / "single"), tokenizer=tokenizer, shards=3,
                         validation_fraction=0.1, record_tokens=64)
    build_from_files(single, load_tokenizer(tokenizer))
    ours, theirs = ({name: data for name, data in tree(corpus, folder).items()} for folder in ("out/text", "single"))
    shards = {name.split("/")[-1]: data for name, data in ours.items() if "array_record" in name}
    assert len(shards) == 4
    assert shards == {name.split("/")[-1]: data for name, data in theirs.items() if "array_record" in name}


def test_the_source_of_the_lowest_priority_number_keeps_its_copy(tmp_path):
    for name, ident in (("a", "first"), ("b", "second")):
        (tmp_path / name).mkdir()
        record = {"id": ident, "text": document(1)}
        (tmp_path / name / "x.jsonl").write_text(json.dumps(record, ensure_ascii=False))
    near = {"id": "zero", "text": edited(document(1), 0.001)}
    (tmp_path / "a/y.jsonl").write_text(json.dumps(near, ensure_ascii=False))
    sources = {"a": SourceInput(input=[str(tmp_path / "a")], rules="web", priority=2),
               "b": SourceInput(input=[str(tmp_path / "b")], rules="web", priority=1)}
    options = config(tmp_path, input=[], sources=sources)
    ran = prepare(options)
    assert list(clean_texts(tmp_path / "out", "b")) == ["second"] and not clean_texts(tmp_path / "out", "a")
    rows = make_report(options, ran, command="test")["funnel"]
    assert all(row["in"] == row["kept"] + row["dropped"] + row["quarantined"] for row in rows)


def test_verified_pairs_that_are_not_alike_stay(corpus):
    prepare(config(corpus, minhash={"verify": 0.999}))
    assert len(clean_texts(corpus / "out")) == 66
    prepare(config(corpus, minhash={"verify": 0.5}))
    assert len(clean_texts(corpus / "out")) == 60


def test_short_documents_are_never_near_copies(tmp_path):
    (tmp_path / "raw").mkdir()
    texts = ["很好。", "不好。", "很好", "一般般吧"]
    (tmp_path / "raw/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(config(tmp_path, rules="light"))
    assert sorted(clean_texts(tmp_path / "out").values()) == sorted(texts)


def test_a_bad_record_stops_the_run_after_everything_else_is_read(corpus):
    (corpus / "raw/bad.jsonl").write_text('{"text": "好"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2: .*Bad records: 1, allowed: max_bad=0; they are listed in"):
        prepare(config(corpus))
    listed = json.loads((corpus / "out/quarantine.jsonl").read_text())
    assert listed["position"] == 2 and listed["raw"].startswith('{"text":') and listed["reason"]
    times = {path: path.stat().st_mtime_ns for path in (corpus / "out/stages/read/commits").iterdir()}
    assert len(times) == 5
    options = config(corpus, max_bad=1)
    rows = funnel(prepare(options), options)
    assert rows["read"]["quarantined"] == 1 and len(clean_texts(corpus / "out")) == 60
    assert times == {path: path.stat().st_mtime_ns for path in (corpus / "out/stages/read/commits").iterdir()}


def test_a_limit_takes_the_first_records_of_each_source(corpus):
    options = config(corpus, limit=20, deduplicate=False, minhash={"enabled": False})
    rows = funnel(prepare(options), options)
    assert rows["read"]["kept"] == rows["lines"]["kept"] == 20
    options = config(corpus, deduplicate=False, minhash={"enabled": False})
    assert funnel(prepare(options), options)["lines"]["kept"] == 72


def test_where_the_rules_drop_all_the_worst_is_named(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.jsonl").write_text(json.dumps({"text": "太短。"}))
    with pytest.raises(UserError, match=r"dropped all documents \(length 1\).*rules=light"):
        prepare(config(tmp_path))


def test_evaluation_text_is_kept_out(corpus, tmp_path):
    held = document(3)
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": held[40:80]}, ensure_ascii=False))
    options = config(corpus, decontaminate={"files": [str(tmp_path / "exam.jsonl")]})
    rows = funnel(prepare(options), options)
    assert rows["lines"]["dropped"] == 1 and "d0003" not in clean_texts(corpus / "out")


def test_similar_lines_go_where_the_rule_set_says_so(tmp_path):
    (tmp_path / "raw").mkdir()
    twice = "我们明天上午一起去城市里最大的图书馆看书。"
    text = document(1, 8) + twice + document(2, 8) + twice + document(4, 8)
    (tmp_path / "raw/a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False))
    prepare(config(tmp_path))
    assert [kept.count(twice) for kept in clean_texts(tmp_path / "out").values()] == [1]
    prepare(config(tmp_path, rules="light"))
    assert list(clean_texts(tmp_path / "out").values()) == [text]


def test_thresholds_of_a_rule_set_that_no_source_has_are_named(tmp_path, caplog):
    (tmp_path / "text.jsonl").write_text('{"text": "今天的天气很好，我们去公园里走走。"}\n')
    prepare(PrepareConfig(input=[str(tmp_path / "text.jsonl")], output=str(tmp_path / "out"), rules="light",
                          filter={"thresholds": {"web": {"length": {"low": 600}}}}))
    assert "filter.thresholds.web changes nothing: no source has that rule set (in use: light)" in caplog.text
