"""`generate`: what is printed is what the model would say by a full forward, and nothing but its own words decides."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.model.decoder import Decoder
from tests.cli.conftest import call
from tests.runs import read_arrays

DRAWN = ["max_tokens=12", "temperature=1.0", "top_p=1.0"]


def generate(model, *words):
    printed = call("generate", model, *words)
    assert printed.status == 0, printed.err
    return printed.out


def test_temperature_zero_is_the_argmax_of_a_full_forward(text_run):
    """Weights read without our code; behind the end of another document, as this run was trained."""
    arrays = read_arrays(text_run.directory, 3)
    weights = {"blocks": {}}
    for path, array in arrays.items():
        names = path.removeprefix("params['").removesuffix("']").split("']['")
        if path.startswith("params"):
            (weights["blocks"] if len(names) == 2 else weights)[names[-1]] = array
    config = load(PretrainConfig, target=text_run.directory / "config.yaml").model
    tokenizer = load_tokenizer(text_run.directory / "tokenizer.model")
    forward = jax.jit(lambda tokens, segments: Decoder(config).apply({"params": weights}, tokens, segments)[0])
    ids, new = [tokenizer.eos_id, *tokenizer.encode("今天")], []
    for _ in range(10):
        padded, real = np.zeros((1, 32), np.int32), jnp.arange(32)[None] < len(ids) + len(new)
        padded[0, :len(ids) + len(new)] = ids + new
        hidden_SD = np.asarray(forward(padded, real.astype(jnp.int32)))[0]
        logits_V = (hidden_SD[len(ids) + len(new) - 1] @ weights["head"])[:tokenizer.vocab_size]
        assert np.subtract(*np.sort(logits_V)[[-1, -2]]) > 1e-3, "a tie would decide nothing"
        new.append(int(np.argmax(logits_V)))
    assert tokenizer.eos_id not in new
    printed = generate(text_run.directory, "prompt=今天", "max_tokens=10", "temperature=0")
    assert printed == tokenizer.decode(ids + new) + "\n"


def test_the_seed_decides(text_run):
    first, again, other = (generate(text_run.directory, "prompt=the", f"seed={seed}", *DRAWN) for seed in (1, 1, 2))
    assert first == again != other and first.startswith("the")


def test_samples_differ_and_do_not_disturb_each_other(text_run):
    alone = generate(text_run.directory, "prompt=the", *DRAWN).rstrip("\n")
    three = generate(text_run.directory, "prompt=the", "num_samples=3", *DRAWN)
    assert three.startswith(alone + "\n") and three.count("\u2500" * 20) >= 2
    texts = [text.strip("\u2500\n") for text in three.split("\u2500" * 20) if text.strip("\u2500\n")]
    assert len(texts) == len(set(texts)) == 3


def test_a_step_by_its_name(text_run):
    newest, third, second = (generate(f"{text_run.directory}{at}", "prompt=the", *DRAWN, "max_tokens=50")
                             for at in ("", "@3", "@2"))
    assert newest == third != second


def test_from_standard_input_and_from_a_file(text_run, tmp_path, monkeypatch):
    """A pipe ends with a newline that nobody meant; a file says what it says."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("今天\n".encode())))
    assert generate(text_run.directory, "prompt=-", *DRAWN) == generate(text_run.directory, "prompt=今天", *DRAWN)
    (tmp_path / "prompt.txt").write_text("今天")
    assert generate(text_run.directory, f"prompt=@{tmp_path / 'prompt.txt'}", *DRAWN).startswith("今天")


def test_a_prompt_that_is_not_utf8_is_refused(text_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("今".encode() + b"\xff")))
    (tmp_path / "prompt.txt").write_bytes(b"\xc3\x28")
    for word, message in (("prompt=-", "standard input is not UTF-8: invalid start byte at byte 4"),
                          (f"prompt=@{tmp_path / 'prompt.txt'}", "can't decode byte 0xc3"),
                          ("prompt=a\udcff", "control character U+DCFF")):
        printed = call("generate", text_run.directory, word, *DRAWN)
        assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err


def test_no_prompt_begins_a_document(text_run):
    assert generate(text_run.directory, *DRAWN) == generate(text_run.directory, "prompt=", *DRAWN)


@pytest.mark.parametrize("prompt", ["[bold]the[/]", "[/INST]", ":smile: the", "https://example.org 42"])
def test_a_prompt_is_no_markup(text_run, prompt):
    assert generate(text_run.directory, f"prompt={prompt}", *DRAWN).startswith(prompt)


def test_longer_than_the_model_was_trained_on(text_run):
    assert "longer than the 64 tokens that the model was trained on" in generate(text_run.directory, "prompt=the",
                                                                                "max_tokens=70", "temperature=0")


def test_what_cannot_be_asked(text_run, tmp_path):
    assert "has no step 7; it has 2, 3" in call("generate", f"{text_run.directory}@7").err
    bare = tmp_path / "bare"
    shutil.copytree(text_run.directory, bare)
    (bare / "tokenizer.model").unlink()
    printed = call("generate", bare)
    assert printed.status == 2 and "has no tokenizer: it was trained on synthetic tokens" in printed.err
    shutil.rmtree(bare / "checkpoints")
    printed = call("generate", bare)
    assert printed.status == 2 and "has no checkpoint yet" in printed.err


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Twelve rows, one of them twice, with fields of their own."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": "今天" * (1 + n % 5) + "the " * (n % 3), "name": n} for n in range(12)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*rows, rows[0]]))
    return path


FILE = ["max_tokens=10", "temperature=1", "seed=3", "num_samples=2", "slots=4", "logprobs=2"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_prompts_to_a_file_of_texts(text_run, prompts, tmp_path):
    output = tmp_path / "texts.jsonl"
    words = [text_run.directory, f"prompts={prompts}", f"output={output}", *FILE]
    printed = generate(*words)
    assert "26 texts, 26 of them new" in printed
    rows, given = rows_of(output), rows_of(prompts)
    assert [row["name"] for row in rows] == [row["name"] for row in given for _ in range(2)]
    assert all(row["prompt"] == given[row["name"]]["prompt"] for row in rows)
    assert [row["provenance"]["sample"] for row in rows] == [0, 1] * 13
    assert len({row["text"] for row in rows}) > 20, "samples, and a prompt that comes twice, have draws of their own"
    assert all(len(row["logprobs"]) == row["tokens"] and len(row["logprobs"][0]["top"]) == 2 for row in rows)
    before = output.read_bytes()
    assert "0 of them new" in generate(*words) and output.read_bytes() == before
    assert call("generate", *words, "temperature=0.5").status == 2


@pytest.mark.parametrize("share", [0.0, 0.4, 0.95])
def test_torn_anywhere_it_goes_on_to_the_same_texts(text_run, prompts, tmp_path, share):
    """To the same bytes, but for the last bits of log-probabilities, which depend on the rows beside."""
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    words = [text_run.directory, f"prompts={prompts}", *FILE[:-1]]
    generate(*words, f"output={whole}")
    part.write_bytes(whole.read_bytes()[:int(whole.stat().st_size * share)])
    shutil.copy(f"{whole}.state", f"{part}.state")
    generate(*words, f"output={part}", "slots=4")
    assert part.read_bytes() == whole.read_bytes()


def test_a_text_ends_before_its_stop(text_run):
    free = generate(text_run.directory, "prompt=the", "max_tokens=20", "temperature=0").removesuffix("\n")
    stop = free[6:8]
    printed = generate(text_run.directory, "prompt=the", "max_tokens=20", "temperature=0", f"stop=['{stop}']")
    assert printed == free[:free.index(stop, 3)] + "\n"


@pytest.mark.parametrize(("row", "message"), [
    ("{", ":2: malformed JSON"), ("[]", ":2: a row needs either prompt"), ("{}", ":2: a row needs either prompt"),
    ('{"prompt": 3}', ":2: prompt must be a text"), ('{"prompt": "x", "text": "y"}', ":2: the field text is written"),
    ('{"messages": []}', ":2: messages need a model that was taught"),
    (json.dumps({"prompt": "the " * 100}), "leaves no room behind it"),
    ('{"prompt": "a\\ud800"}', ":2: a text holds half of a surrogate pair"),
    ('{"prompt": "a", "name": {"of": ["\\udfff"]}}', ":2: a text holds half of a surrogate pair"),
    ('{"prompt": "\udcff"}', ":2: invalid UTF-8 at byte"), ("[" * 100_000, ":2: malformed JSON: nested too deeply")])
def test_a_row_that_cannot_be_read_is_named(text_run, tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(('{"prompt": "the\u2028"}\n' + row + "\n").encode("utf-8", "surrogateescape"))
    printed = call("generate", text_run.directory, f"prompts={path}", f"output={tmp_path / 'out.jsonl'}")
    assert printed.status == 2 and message in printed.err and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("overrides", "message"), [
    (["prompts=x.jsonl"], "prompts and output go together"), (["output=x.jsonl"], "prompts and output go together"),
    (["logprobs=3"], "give prompts and output"), (["prompts=x.jsonl", "output=y.json"], "ends in .jsonl"),
    (["prompts=x.jsonl", "output=y.jsonl", "prompt=z"], "give one of them"),
    (["prompts=missing.jsonl", "output=y.jsonl"], "prompts=missing.jsonl is no file")])
def test_keys_that_do_not_go_together(overrides, message):
    printed = call("generate", "nowhere", *overrides)
    assert printed.status == 2 and message in printed.err
