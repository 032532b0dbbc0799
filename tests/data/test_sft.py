"""Dialogues are packed whole, once an epoch, the same for any number of processes; ratios are nested and reported."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import SFTDataConfig
from ctllm_jax.data.chat import Message
from ctllm_jax.data.sft import SFTData, best_fit
from ctllm_jax.data.tokenizer import load_tokenizer

ALIGNMENT = Path(__file__).resolve().parents[3] / "shared" / "data" / "alignment"
S, ROWS = 96, 3


@pytest.fixture(scope="module")
def write(tmp_path_factory, make_texts):
    """(count, seed) -> a file of so many dialogues of one to three turns."""
    def write(count, *, seed=0):
        texts = iter([text[:20] for text in make_texts(6 * count, seed=seed)])
        path = tmp_path_factory.mktemp("dialogues") / "rows.jsonl"
        rows = [{"messages": [{"role": role, "content": next(texts)} for role in ("user", "assistant")
                              * (1 + row % 3)]} for row in range(count)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="module")
def sources(write):
    """60 Chinese rows in two sources, 80 English ones."""
    return {"zh-a": {"path": str(write(40)), "group": "zh"}, "zh-b": {"path": str(write(20, seed=1)), "group": "zh"},
            "english": {"path": str(write(80, seed=2)), "group": "en"}}


@pytest.fixture(scope="module")
def load(tokenizer_path, sources):
    """Changes of the config -> the data."""
    def load(*, rows=ROWS, seed=5, sequence_length=S, vocab_size=352, **changes):
        config = SFTDataConfig(**{"sources": sources, **changes})
        return SFTData(config, tokenizer=load_tokenizer(tokenizer_path), sequence_length=sequence_length, rows=rows,
                       seed=seed, vocab_size=vocab_size)

    return load


@pytest.fixture(scope="module")
def data(load):
    """The default: every dialogue."""
    return load()


def dialogues_of(row):
    """The segments of a row: (ids, weights of the targets)."""
    segments = []
    for segment in range(1, int(row.segment_ids.max()) + 1):
        here = np.flatnonzero(row.segment_ids == segment)
        assert (np.diff(here) == 1).all()
        assert row.positions[here].tolist() == list(range(len(here)))
        assert row.targets[here[:-1]].tolist() == row.tokens[here[1:]].tolist()
        assert row.loss_weights[here[-1]] == 0 and row.targets[here[-1]] == 0
        segments.append((tuple(row.tokens[here].tolist()), tuple(row.loss_weights[here[:-1]].tolist())))
    return segments


def epoch_of(data, epoch, rows=ROWS):
    first = epoch * data.steps_per_epoch
    return [data.row(step, row) for step in range(first, first + data.steps_per_epoch) for row in range(rows)]


def expected(data):
    examples = data.examples
    return sorted((tuple(examples.ids[first:last].tolist()), tuple(examples.weights[first + 1:last].tolist()))
                  for first, last in itertools.pairwise(examples.offsets))


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_holds_every_dialogue_once_and_whole(data, epoch):
    rows = epoch_of(data, epoch)
    assert sorted(segment for row in rows for segment in dialogues_of(row)) == expected(data)
    for row in rows:
        padding = row.segment_ids == 0
        assert not row.loss_weights[padding].any() and not row.tokens[padding].any()
        assert (np.diff(padding.astype(int)) >= 0).all()  # only at the end
    assert sum(bool(row.segment_ids.any()) for row in rows) == data.rows_per_epoch
    assert data.steps_per_epoch == -(-data.rows_per_epoch // ROWS)
    assert data.steps == 3 * data.steps_per_epoch
    assert rows[0].tokens.dtype == rows[0].segment_ids.dtype == rows[0].positions.dtype == np.int32
    assert rows[0].loss_weights.dtype == np.float32


def test_epochs_and_seeds_differ_and_repeat(load, data):
    def orders(data):
        return [b"".join(row.tokens.tobytes() for row in epoch_of(data, epoch)) for epoch in (0, 1, 2, 3, 0)]

    first = orders(data)
    assert first[0] == first[4] and len(set(first)) == 4
    assert orders(load()) == first
    assert orders(load(seed=6))[0] != first[0]


def test_dialogues_of_equal_length_share_rows_with_others_in_the_next_epoch(data):
    together = [{frozenset(segment for segment in dialogues_of(row)) for row in epoch_of(data, epoch)}
                for epoch in (0, 1)]
    assert together[0] != together[1]


def test_rows_are_the_same_for_any_number_of_processes(data):
    whole = data.iterate(4, local_rows=range(ROWS))
    parts = [data.iterate(4, local_rows=[0]), data.iterate(4, local_rows=[2, 1])]
    for _ in range(2 * data.steps_per_epoch):
        batch, first, others = next(whole), *map(next, parts)
        for mine, one, two in zip(batch[:5], first[:5], others[:5], strict=True):
            assert mine.shape == (ROWS, S)
            assert np.array_equal(mine, np.stack([one[0], two[1], two[0]]))
    with pytest.raises(ValueError, match="local_rows"):
        data.iterate(0, local_rows=[ROWS])


def test_a_resumed_iteration_goes_on(data):
    from_start = list(itertools.islice(data.iterate(0, local_rows=[0, 1]), 2 * data.steps_per_epoch + 3))
    resumed = list(itertools.islice(data.iterate(7, local_rows=[0, 1]), 2 * data.steps_per_epoch - 4))
    for one, other in zip(from_start[7:], resumed, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one[:5], other[:5], strict=True))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60))
def test_best_fit_is_what_the_plain_rule_gives(lengths):
    lengths = sorted(lengths, reverse=True)
    packing = best_fit(lengths, 40)
    rooms = []
    for length, row in zip(lengths, packing.row_of_rank, strict=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            assert rooms[row] == min(fitting)
        else:
            assert row == len(rooms)
            rooms.append(40)
        rooms[row] -= length
    assert packing.rows == len(rooms) and all(room >= 0 for room in rooms)


def test_two_hundred_thousand_dialogues_leave_little_room():
    lengths = np.sort(np.minimum(2048, np.random.default_rng(0).lognormal(5.3, 1, 200_000).astype(int) + 1))[::-1]
    packing = best_fit(lengths, 2048)
    assert lengths.sum() / (packing.rows * 2048) > 0.999


@pytest.mark.parametrize(("policy", "kept"), [("drop", "short"), ("truncate", "cut")])
def test_what_is_too_long(load, data, policy, kept):
    length = 40
    assert data.examples.lengths.max() > length >= data.examples.lengths.min()
    changed = load(sequence_length=length, over_length=policy)
    counted = changed.report["sources"].values()
    too_long = int((data.examples.lengths > length).sum())
    if kept == "short":
        assert sum(each["over_length"] for each in counted) == too_long
        assert expected(changed) == [pair for pair in expected(data) if len(pair[0]) <= length]
    else:
        cut = [(ids[:length], weights[:length - 1]) for ids, weights in expected(data)]
        learned = sorted(pair for pair in cut if any(pair[1]))
        assert expected(changed) == learned
        assert sum(each["cut"] for each in counted) == too_long
        assert sum(each["nothing_learned"] for each in counted) == len(cut) - len(learned)


def test_what_is_too_long_can_be_refused_by_name(load):
    with pytest.raises(UserError, match=r"rows.jsonl:\d+: \d+ tokens are more than sequence_length=40"):
        load(sequence_length=40, over_length="raise")
    with pytest.raises(UserError, match="no dialogue is left"):
        load(sequence_length=4)


def drawn(data, name="english"):
    source = data.report["sources"]
    index = list(source).index(name)
    return {tuple(data.examples.ids[slice(*data.examples.offsets[at:at + 2])].tolist())
            for at in np.flatnonzero(data.examples.sources == index)}


def test_ratios_are_nested_and_reported(load):
    smaller = set()
    for parts, rows in [("8:1", 7), ("4:1", 15), ("2:1", 30), ("1:1", 60), ("3:4", 80)]:
        data = load(ratio=f"zh:en={parts}")
        report = data.report
        assert {group: each["rows"] for group, each in report["groups"].items()} == {"zh": 60, "en": rows}
        assert report["sources"]["english"]["not_drawn"] == 80 - rows
        for group, names in {"zh": ["zh-a", "zh-b"], "en": ["english"]}.items():
            for figure in ("tokens", "learned_tokens"):
                assert report["groups"][group][figure] == sum(report["sources"][name][figure] for name in names)
        assert report["sources"]["english"]["tokens"] == sum(map(len, drawn(data)))
        assert smaller < drawn(data)
        smaller = drawn(data)
    assert drawn(load(ratio="zh:en=2:1")) == drawn(load(ratio="zh:en=2:1"))
    assert drawn(load(ratio="zh:en=2:1")) != drawn(load(ratio="zh:en=2:1", seed=6))
    assert load(ratio="zh:en=1:0").report["groups"]["en"]["rows"] == 0


def test_a_draw_depends_on_nothing_but_the_rows(load, sources, write):
    reversed_file = write(80, seed=2)
    reversed_file.write_text("".join(reversed(reversed_file.read_text().splitlines(keepends=True))))
    changed = {**sources, "english": {**sources["english"], "path": str(reversed_file)}}
    assert drawn(load(ratio="zh:en=2:1", sources=changed)) == drawn(load(ratio="zh:en=2:1"))


def test_a_group_too_small_for_the_ratio_is_named(load):
    with pytest.raises(UserError, match="needs 120 rows of group 'en', which has 80"):
        load(ratio="zh:en=1:2")


@pytest.mark.parametrize(("ratio", "complaint"), [("zh:fr=2:1", "names the group 'fr'.*groups: en, zh"),
                                                  ("2:1", "must be KEPT:DRAWN=a:b"), ("zh:en=0:1", "must be"),
                                                  ("zh:zh=1:1", "must be")])
def test_a_ratio_out_of_form_is_refused(sources, ratio, complaint):
    with pytest.raises(ValidationError, match=complaint):
        SFTDataConfig(sources=sources, ratio=ratio)


def test_counts_by_source_add_up(data):
    names = data.report["sources"]
    assert data.epochs(data.steps_per_epoch) == dict.fromkeys(names, 1.0)
    assert data.tokens_per_source(2 * data.steps_per_epoch) == {name: 2 * each["tokens"]
                                                                for name, each in names.items()}
    steps = data.steps_per_epoch + 2
    seen = sum(int((data.row(step, row).segment_ids > 0).sum()) for step in range(steps) for row in range(ROWS))
    assert sum(data.tokens_per_source(steps).values()) == data.tokens_at(steps) == seen
    learned = sum(int(np.count_nonzero(row.loss_weights)) for row in epoch_of(data, 0))
    assert learned == sum(each["learned_tokens"] for each in names.values())


@pytest.mark.parametrize("changes", [{"seed": 6}, {"rows": 4}, {"sequence_length": 128}, {"loss_on": "last_answer"},
                                     {"ratio": "zh:en=2:1"}, {"template": {"kind": "chatml"}},
                                     {"template": {"system": "好"}}])
def test_the_fingerprint_tells_data_apart(load, data, changes):
    assert load(epochs=5).fingerprint == data.fingerprint
    assert load(**changes).fingerprint != data.fingerprint
    assert json.loads(json.dumps(data.fingerprint)) == data.fingerprint


def test_a_model_too_small_for_the_ids_is_named(load):
    with pytest.raises(UserError, match="model.vocab_size=300 must be at least 3"):
        load(vocab_size=300)


def test_a_dialogue_that_the_template_refuses_is_left_out_and_counted(load, tmp_path, caplog):
    jinja = tmp_path / "chat.jinja"
    jinja.write_text("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
                     "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'assistant' %}"
                     "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}"
                     "<s>{{ m.content | replace('x', '') }}{% endif %}{% endfor %}")
    path = tmp_path / "rows.jsonl"
    roles = ["user", "assistant"], ["user", "user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"]
    rows = [{"messages": [{"role": role, "content": "天气"} for role in each]} for each in roles]
    rows += [{"prompt": "x", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "好"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = {"kind": "jinja", "path": str(jinja)}
    source = load(sources={"a": {"path": str(path)}}, template=template).report["sources"]["a"]
    assert (source["read"], source["rows"], source["dropped"]) == (5, 2, {"refused by the chat template": 3})
    said = [record.message for record in caplog.records if "is left out" in record.message]
    assert len(said) == 1 and re.search("rows.jsonl:2 .*roles must alternate", said[0])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    with pytest.raises(UserError, match="no dialogue is left to train on .*refused by the chat template"):
        load(sources={"a": {"path": str(path)}}, template=template)
    assert re.search("rows.jsonl:1 .*rewrites the text", caplog.text)


def test_a_source_that_is_not_there_is_named(load):
    with pytest.raises(UserError, match="data.sources.data: none.jsonl does not exist"):
        load(**SFTDataConfig.from_shorthand("none.jsonl"))


def test_real_dialogues(load):
    if not ALIGNMENT.is_dir():
        pytest.skip(f"no alignment data at {ALIGNMENT}")
    sources = {"oasst": {"path": str(ALIGNMENT / "oasst_sft_zh.json"), "group": "zh"},
               "demo": {"path": str(ALIGNMENT / "dpo_en_demo.json"), "group": "en"}}
    data = load(sources=sources, ratio="zh:en=4:1", sequence_length=4096,
                template={"system": "你是一个有用的人工智能助手。"})
    assert data.report["sources"]["oasst"]["layouts"] == ["alpaca (instruction, input, output, history)"]
    read, cut = data.report["sources"]["oasst"]["read"], data.report["sources"]["oasst"]["over_length"]
    assert (read, data.report["groups"]["zh"]["rows"]) == (689, 689 - cut)
    assert data.report["groups"]["en"]["rows"] == (689 - cut) // 4
    first = data.template.render([Message("user", "你好"), Message("assistant", "好")])
    assert (first.ids == 195).sum() == (first.ids == 196).sum() == 1
    assert sorted(segment for row in epoch_of(data, 0) for segment in dialogues_of(row)) == expected(data)


def contents(examples):
    return {tuple(examples.ids[first:last].tolist()) for first, last in itertools.pairwise(examples.offsets)}


def test_every_ratio_holds_out_the_same_and_trains_on_none_of_it(load):
    found = {ratio: load(ratio=ratio, held_out=0.2) for ratio in
             (None, "zh:en=1:1", "zh:en=4:1", "zh:en=1:0", "en:zh=1:0")}
    apart = {ratio: {name: each["held_out_sha256"] for name, each in data.report["sources"].items()}
             for ratio, data in found.items()}
    assert len({json.dumps(each) for each in apart.values()}) == 1
    for data in found.values():
        held_out = {tuple(batch.tokens[row][batch.segment_ids[row] == segment].tolist())
                    for each in data.held_out(rows=2, split="", max_tokens=10**9).values() for batch in each
                    for row in range(2) for segment in range(1, int(batch.segment_ids[row].max()) + 1)}
        assert len(held_out) > 5 and not held_out & contents(data.examples)
        assert set(data.held_out(rows=2, split="", max_tokens=10**9)) == {"zh-a", "zh-b", "english"}
    assert drawn(found["zh:en=4:1"]) < drawn(found["zh:en=1:1"]) < drawn(found[None])
    assert found["zh:en=1:0"].report["groups"]["en"]["rows"] == 0 == found["en:zh=1:0"].report["groups"]["zh"]["rows"]


def test_a_sample_of_held_out_dialogues_does_not_depend_on_their_length(load, tmp_path, make_texts, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": text[:9], "completion": text[9:12 + 12 * (number % 3)]}
            for number, text in enumerate(make_texts(400, seed=4))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(sources={"x": {"path": str(path)}}, held_out=0.5)
    caplog.clear()

    def lengths(max_tokens):
        return sorted(int((batch.segment_ids[0] == segment).sum())
                      for batch in data.held_out(rows=1, split="", max_tokens=max_tokens)["x"]
                      for segment in range(1, int(batch.segment_ids[0].max()) + 1))

    every = lengths(10**9)
    assert not caplog.records and len(every) == data.report["held_out"]
    sample = lengths(sum(every) // 4)
    assert len(sample) == len(every) // 4 and f"{len(sample)} of {len(every)} held-out dialogues" in caplog.text
    assert np.mean(sample) == pytest.approx(np.mean(every), rel=0.1)
    assert np.mean(every[-len(sample):]) > 1.3 * np.mean(every)  # what the longest ones alone would give
    assert lengths(1) == lengths(2) and len(lengths(1)) == 1


def test_copies_of_a_dialogue_are_held_out_together(load, write):
    path = write(60, seed=3)
    path.write_text(path.read_text() * 3)
    data = load(sources={"x": {"path": str(path)}}, held_out=0.3)
    assert data.report["held_out"] % 3 == 0 and 0 < data.report["held_out"] < 180
    with pytest.raises(UserError, match="held_out=0.9999999 leaves none of 180 dialogues"):
        load(sources={"x": {"path": str(path)}}, held_out=0.9999999)
