"""Pairs are packed whole, both answers in one row, once an epoch, the same for any number of processes."""

import itertools
import json

import numpy as np
import pytest

from ctllm_jax.config.dpo import PairDataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.preference import PreferenceData
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer

S, CONTEXT, ROWS = 192, 90, 3


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """(rows of (prompt, chosen, rejected)) -> a file of them."""
    def write(rows):
        path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
        path.write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True)),
                                           ensure_ascii=False) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="module")
def load(tokenizer_path, make_texts, write):
    """Changes of the config -> the data: 30 Chinese pairs in two sources, 20 English ones."""
    texts = iter([text[:20] for text in make_texts(200)])
    sources = {name: {"path": write([(next(texts), next(texts), next(texts)) for _ in range(count)]), "group": group}
               for name, count, group in (("a", 10, "zh"), ("b", 20, "zh"), ("c", 20, "en"))}

    def load(*, rows=ROWS, seed=5, sequence_length=S, context_length=CONTEXT, vocab_size=352, **changes):
        tokenizer = load_tokenizer(tokenizer_path)
        return PreferenceData(PairDataConfig(**{"sources": sources, **changes}), tokenizer=tokenizer,
                              template=open_template(TemplateConfig(kind="plain"), tokenizer), rows=rows, seed=seed,
                              sequence_length=sequence_length, context_length=context_length, vocab_size=vocab_size)

    return load


@pytest.fixture(scope="module")
def data(load):
    data = load()
    data.reference_logps = -np.arange(1, 2 * len(data) + 1, dtype=np.float32)
    return data


def answers_of(data, row):
    """The segments of a row, each as (answer number by its reference, pair id, is chosen)."""
    segments = int(row.segment_ids.max())
    known = row.preference
    assert not known.pair_ids[segments:].any() and not known.reference_logps[segments:].any()
    found = []
    for segment in range(segments):
        answer = int(-known.reference_logps[segment]) - 1
        first, last = data.answers.offsets[answer:answer + 2]
        here = np.flatnonzero(row.segment_ids == segment + 1)
        assert np.array_equal(row.tokens[here], data.answers.ids[first:last])
        assert np.array_equal(row.loss_weights[here[:-1]], data.answers.weights[first + 1:last])
        assert known.is_chosen[segment] == (answer % 2 == 0)
        assert data.group_names[known.group[segment]] == ("zh" if data.answers.sources[answer] < 2 else "en")
        found.append((answer, int(known.pair_ids[segment])))
    return found


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_an_epoch_holds_every_pair_once_in_one_row(data, epoch):
    first = epoch * data.steps_per_epoch
    rows = [data.row(step, row) for step in range(first, first + data.steps_per_epoch) for row in range(ROWS)]
    seen = []
    for row in rows:
        found = answers_of(data, row)
        pairs = {}
        for answer, pair_id in found:
            pairs.setdefault(pair_id, []).append(answer)
        assert all(both[0] // 2 == both[1] // 2 and len(both) == 2 for both in pairs.values()) and 0 not in pairs
        seen += [answer for answer, _ in found]
    assert sorted(seen) == list(range(2 * len(data)))
    assert rows[0].preference.pair_ids.shape == (data.num_segments,) and data.num_segments % 2 == 0
    assert max(int(row.segment_ids.max()) for row in rows) == data.num_segments
    assert data.steps == 2 * data.steps_per_epoch and data.steps_per_epoch == -(-data.rows_per_epoch // ROWS)
    assert data.epochs(data.steps) == {"a": 2, "b": 2, "c": 2}
    tokens = np.cumsum([0, *(int((row.segment_ids > 0).sum()) for row in rows)])[::ROWS]
    assert [data.tokens_at(first + step) - data.tokens_at(first) for step in range(len(tokens))] == tokens.tolist()


def test_rows_are_a_function_of_seed_and_step(load, data):
    def arrays(data, step, rows):
        batch = next(data.iterate(step, local_rows=rows))
        return [*batch[:5], *batch.preference[:3]]

    whole = arrays(data, 7, range(ROWS))
    parts = [arrays(load(), 7, [2]), arrays(data, 7, [1, 0])]
    for mine, last, others in zip(whole, *parts, strict=True):
        assert np.array_equal(mine, np.stack([others[1], others[0], last[0]]))
    late = list(itertools.islice(data.iterate(0, local_rows=range(ROWS)), 8))[7]
    assert np.array_equal(late.tokens, whole[0])
    assert not np.array_equal(arrays(load(seed=6), 7, range(ROWS))[0], whole[0])


def test_a_step_of_as_many_pairs_as_rows(load):
    data = load(pairs_per_row=1)
    assert data.num_segments == 2 and data.rows_per_epoch == len(data)
    assert all(data.row(0, row).segment_ids.max() == 2 for row in range(ROWS))
    assert load().num_segments > 2


WORDS = "今天天气不错。"


@pytest.mark.parametrize(("policy", "expected"), [
    ("drop", {"over_length": 2, "cut": 0, "pairs": 1}), ("truncate", {"over_length": 0, "cut": 2, "pairs": 3})])
def test_what_is_too_long_is_counted(load, write, caplog, policy, expected):
    path = write([("问", WORDS, WORDS * 2), ("问", WORDS, WORDS * 30), ("问", WORDS * 30 + "我", "我" + WORDS * 31),
                  (WORDS * 20, "我", "我们")])
    data = load(sources={"x": {"path": path}}, over_length=policy, sequence_length=64, context_length=64)
    report = data.report["sources"]["x"]
    assert {name: report[name] for name in expected} == expected and report["over_length_prompt"] == 1
    assert "leave no room for answers" in caplog.text and "2 of 4 pairs are" in caplog.text
    lengths = data.answers.lengths.reshape(-1, 2)
    assert (lengths.sum(axis=1) <= 64).all()
    # What the shorter answer leaves is the longer one's.
    assert lengths.max() > 32 if policy == "truncate" else lengths.max() <= 32


def test_unequal_texts_of_equal_ids_are_counted(load, write):
    """Cut to one length, the answers begin alike."""
    path = write([("问", WORDS * 30 + "我", WORDS * 30 + "去"), ("问", "今天", "天气")])
    report = load(sources={"x": {"path": path}}, over_length="truncate", sequence_length=64).report["sources"]["x"]
    assert report["equal_ids"] == 1 and report["pairs"] == 1


def test_a_context_shorter_than_the_row_bounds_each_answer(load, write):
    path = write([("问", WORDS * 30, "天气")])
    data = load(sources={"x": {"path": path}}, over_length="truncate", sequence_length=96, context_length=40)
    assert data.answers.lengths.max() == 40


@pytest.mark.parametrize(("changes", "message"), [
    ({"over_length": "raise", "sequence_length": 20}, r"rows.jsonl:\d+: \d+ and \d+ tokens, prompts included, do not"),
    ({"sequence_length": 6}, "no pair is left to train on with sequence_length=6"),
    ({"vocab_size": 100}, "model.vocab_size=100 must be at least"),
    ({"sources": {"x": {"path": "missing.jsonl"}}}, "data.sources.x: missing.jsonl does not exist"),
])
def test_what_does_not_fit_is_refused(load, changes, message):
    with pytest.raises(UserError, match=message):
        load(**changes)


def prompts_of(data, pairs):
    """The ids of each pair's prompt."""
    found = []
    for pair in pairs:
        here = slice(*data.answers.offsets[2 * pair:2 * pair + 2])
        found.append(data.answers.ids[here][:np.flatnonzero(data.answers.weights[here])[0]].tobytes())
    return found


def trained_pairs(data):
    rows = [data.items(step, row) for step in range(data.steps_per_epoch) for row in range(ROWS)]
    return np.concatenate(rows).tolist()


@pytest.fixture(scope="module")
def asked_twice(load, make_texts, write):
    """20 prompts, each with a pair, a copy, the pair turned round, and another answer; in one file in another order."""
    texts = [text[:12] for text in make_texts(300)]
    rows = [row for index in range(20) for prompt, *answers in [texts[4 * index:4 * index + 4]] for row in (
        (prompt, answers[0], answers[1]), (prompt, answers[0], answers[1]), (prompt, answers[1], answers[0]),
        (prompt, answers[2], answers[1]))]
    return {"x": {"path": write(rows), "group": "zh"}, "y": {"path": write(rows[::-1]), "group": "en"}}


def test_what_is_held_out_is_never_asked_in_training(load, asked_twice):
    data = load(sources=asked_twice, held_out=0.3)
    trained = trained_pairs(data)
    apart = sorted(set(range(len(data))) - set(trained))
    assert len(trained) == len(set(trained)) and len(apart) == data.report["held_out"] > 0
    assert not set(prompts_of(data, trained)) & set(prompts_of(data, apart))
    assert sorted(pair for row in data.all_rows() for pair in row) == list(range(len(data)))
    report = data.report["sources"]
    assert report["x"]["held_out"] == report["y"]["held_out"] and report["x"]["pairs"] == report["y"]["pairs"]
    assert report["x"]["held_out_sha256"] == report["y"]["held_out_sha256"]
    assert data.report["groups"]["zh"]["pairs"] == report["x"]["pairs"] == len(trained) // 2
    assert data.epochs(data.steps) == {"x": 2, "y": 2}


def test_held_out_batches_hold_every_pair_once_with_its_reference(load, asked_twice):
    data = load(sources=asked_twice, held_out=0.3)
    batches = data.held_out(rows=4, split="anything", max_tokens=10**9)
    data.reference_logps = -np.arange(1, 2 * len(data) + 1, dtype=np.float32)  # set after, as a run does
    apart = set(range(len(data))) - set(trained_pairs(data))
    seen = {}
    for name, each in batches.items():
        for batch in each:
            assert batch.tokens.shape == (4, S) and batch.preference.group.shape == (4, data.num_segments)
            for row in range(4):
                one = type(batch)(*(part[row] for part in batch[:5]),
                                  type(batch.preference)(*(part[row] for part in batch.preference)))
                seen.setdefault(name, []).extend(answer for answer, _ in held_out_answers(data, one))
    assert sorted(answer for name in seen for answer in seen[name]) == sorted(
        answer for pair in apart for answer in (2 * pair, 2 * pair + 1))
    assert {int(data.answers.sources[answer]) for answer in seen["y"]} == {1}
    assert load().held_out(rows=4, split="", max_tokens=10**9) == {}


def test_a_sample_of_held_out_pairs_has_pairs_of_every_length(load, write, make_texts, caplog):
    texts = [text[:4 + 24 * (number % 2)] for number, text in enumerate(make_texts(600))]
    data = load(sources={"x": {"path": write(list(zip(texts[::3], texts[1::3], texts[2::3], strict=True)))}},
                held_out=0.5)
    apart = sorted(set(range(len(data))) - set(trained_pairs(data)))
    lengths = data.answers.lengths.reshape(-1, 2).sum(axis=1)
    limit = int(lengths[apart].sum()) // 3
    found = []
    for batch in data.held_out(rows=1, split="", max_tokens=limit)["x"]:
        one = type(batch)(*(part[0] for part in batch[:5]),
                          type(batch.preference)(*(part[0] for part in batch.preference)))
        found.append(int((one.segment_ids > 0).sum()))
    assert f"{len(apart) // 3} of {len(apart)} held-out pairs are evaluated" in caplog.text
    assert sum(found) == pytest.approx(limit, rel=0.15)


def held_out_answers(data, row):
    """As `answers_of`, whatever the groups."""
    return [(int(-row.preference.reference_logps[segment]) - 1, int(row.preference.pair_ids[segment]))
            for segment in range(int(row.segment_ids.max()))]


def test_a_share_held_out_changes_the_run_but_not_the_reference(load, asked_twice):
    whole, part = load(sources=asked_twice), load(sources=asked_twice, held_out=0.3)
    assert whole.identity == part.identity and whole.fingerprint != part.fingerprint


def test_a_share_that_leaves_nothing_is_refused(load, write):
    with pytest.raises(UserError, match="held_out=0.999999 leaves none of 1 pairs"):
        load(sources={"x": {"path": write([("问", "今天", "天气")])}}, held_out=0.999999)
