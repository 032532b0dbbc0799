"""Hugging Face models as a user takes them: every command on a folder, import-hf, export-hf, and what is refused."""

import io
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax import sharding
from ctllm_jax.config.errors import UserError
from ctllm_jax.data.chat import Message
from ctllm_jax.huggingface.shards import ShardReader, read_tensors, write_tensors
from ctllm_jax.inference.model import load_model
from ctllm_jax.model.decoder import init_params
from ctllm_jax.model.parameters import decoder_parameters
from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint, load_params, read_model_config
from tests.cli.conftest import call
from tests.cli.test_dpo import write_pairs
from tests.cli.test_sft import write_dialogues
from tests.huggingface.folders import CHATML, IDS, edit, make_folder

pytestmark = pytest.mark.parity
MESSAGES = [{"role": "user", "content": "今天天气3，the model?"}, {"role": "assistant", "content": " 去公园\n散步。"},
            {"role": "user", "content": "好 naïve 😀"}]
SMALL = ["compute.scan_layers=true", "batch.tokens=512", "batch.sequence_length=64", "sample.every=0",
         "log.report=false", "log.every=1"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tied Qwen2 in bfloat16 with a byte-level tokenizer, in two files, and more rows than ids."""
    folder = tmp_path_factory.mktemp("hf") / "qwen"
    make_folder(folder, "qwen2", rows=IDS + 37, tie_word_embeddings=True, dtype="bfloat16", shard="150KB",
                eos_token_id=IDS - 3)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="module")
def chain(qwen, tmp_path_factory):
    """Imported, tuned with its own template, then with preferences, and exported: name -> (directory, printed)."""
    folder = tmp_path_factory.mktemp("chain")
    data = write_dialogues(folder / "zh.jsonl")
    pairs = write_pairs(folder / "pairs.jsonl", ["去公园散步。", "天气不错。"])
    steps = {
        "run": ["import-hf", qwen, f"output={folder / 'run'}"],
        "sft": ["sft", "quickstart/sft", f"init={folder / 'run'}", f"data.sources.zh={data}", "data.template=null",
                "evaluation.every=0", "steps=3", f"run.dir={folder / 'sft'}", *SMALL],
        "dpo": ["dpo", "quickstart/dpo", f"init={folder / 'sft'}", f"data.sources.zh.path={pairs}", "steps=2",
                "warmup_ratio=null", f"run.dir={folder / 'dpo'}", *SMALL, "batch.tokens=1024",
                "batch.sequence_length=128"],
        "out": ["export-hf", folder / "dpo", f"output={folder / 'out'}", "dtype=bfloat16", "padding=cut"],
    }
    printed = {name: call(*words) for name, words in steps.items()}
    for each in printed.values():
        assert each.status == 0, each.err
    # Nothing of it needs the folder that it came from.
    return {name: (folder / name, each) for name, each in printed.items()}


def test_it_keeps_its_ids_through_the_whole_chain(chain, qwen):
    from transformers import AutoTokenizer

    theirs, written = AutoTokenizer.from_pretrained(qwen), AutoTokenizer.from_pretrained(chain["out"][0])
    messages = [Message(**each) for each in MESSAGES]
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert len(expected) > 40
    for name in ("run", "sft", "dpo", "out"):
        assert load_model(str(chain[name][0])).template.prompt_ids(messages) == expected, name
    assert written.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False) == expected
    assert (written.eos_token, written.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ends = json.loads((chain["out"][0] / "generation_config.json").read_text())["eos_token_id"]
    assert set(ends) == {IDS - 1, IDS - 3}


def test_it_is_said_what_was_done(chain):
    run, sft, out = (chain[name][1].out for name in ("run", "sft", "out"))
    assert "437 rows, read back bit for bit" in run and "chat template: kept" in run and "launch.py chat" in run
    assert f"from the weights of {chain['run'][0]}" in sft
    assert "38 tensors, 0.00 GB of bfloat16 in 1 file, read back bit for bit; 400 rows for 400 ids" in out
    assert "tokenizer: the same ids for every probe; chat template: written" in out and "note:" not in out
    assert sorted(path.name for path in chain["out"][0].iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    assert not list(chain["out"][0].parent.glob(".*"))


def test_transformers_writes_what_we_write(chain):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = chain["out"][0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), load_model(str(folder))
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:].tolist()
    prompt = "今天天气"
    (text,) = ours.complete([prompt], max_tokens=8, temperature=0.0, seed=0)
    theirs = model.generate(tokenizer(prompt, return_tensors="pt").input_ids, max_new_tokens=8, do_sample=False)
    assert prompt + text == tokenizer.decode(theirs[0], skip_special_tokens=True)
    from ctllm_jax.inference.generate import generate

    found = generate(ours.decoder, ours.params, [ids[0].tolist()], max_tokens=12, temperature=0.0, seed=0,
                     stop_ids=ours.stop_ids)[0]
    assert found == [token for token in answer if token not in ours.stop_ids]


def test_chat_says_what_transformers_says(chain, monkeypatch):
    """The exported folder answers as transformers does with the dialogue's template; the run it came from answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(chain["out"][0], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(chain["out"][0])
    questions, messages, expected = ["今天天气3，the model?", "好"], [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                            return_dict=False)
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:]
        expected.append(tokenizer.decode(answer, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": expected[-1]})
    for name in ("out", "dpo"):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(question + "\n" for question in questions)))
        told = call("chat", chain[name][0], "temperature=0", "max_tokens=12", "system=null")
        assert told.status == 0, told.err
        said = "".join(f"> {question}\n{answer}\n" for question, answer in zip(questions, expected, strict=True))
        if name == "out":
            assert told.out == said
        else:
            assert told.out.startswith(f"> {questions[0]}\n")


def test_a_folder_is_a_model_as_it_lies_there(qwen, tmp_path):
    """Generated from, listed, exported again bit for bit; and split over a mesh once its rows can be."""
    told = call("generate", qwen, "prompt=今天", "max_tokens=4")
    assert told.status == 0 and told.out.startswith("今天"), told.err
    listed = call("checkpoint", "ls", qwen)
    assert listed.status == 0 and "huggingface" in listed.out
    again = call("export-hf", qwen, f"output={tmp_path / 'again'}")
    assert again.status == 0, again.err
    first, second = ShardReader(qwen), ShardReader(tmp_path / "again")
    assert first.entries.keys() == second.entries.keys() and second.entries["model.norm.weight"].dtype == "bfloat16"
    assert all(np.array_equal(first.read(name).view(np.uint16), second.read(name).view(np.uint16))
               for name in first.entries)


def test_weights_come_split_over_a_mesh(qwen, tmp_path):
    padded = call("import-hf", qwen, f"output={tmp_path / 'padded'}", "vocab_multiple=64")
    assert padded.status == 0 and "448 rows" in padded.out, padded.err
    out = call("export-hf", tmp_path / "padded", f"output={tmp_path / 'out'}")
    assert out.status == 0 and "448 rows for 400 ids" in out.out, out.err
    whole = load_model(str(qwen)).params
    embedding = np.concatenate([whole["embedding"], np.zeros((11, 64), np.float32)])
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    for name in ("padded", "out"):
        directory, kept = find_checkpoint(str(tmp_path / name))
        config = read_model_config(directory)
        abstract = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        shardings = sharding.param_shardings(decoder_parameters(config), mesh)
        params = load_params(kept, jax.tree.map(lambda x, placed: jax.ShapeDtypeStruct(
            x.shape, jnp.bfloat16 if x.ndim > 2 else x.dtype, sharding=placed), abstract, shardings))
        assert jax.tree.all(jax.tree.map(lambda x, placed: x.sharding == placed, params, shardings))
        assert params["blocks"]["query"].dtype == jnp.bfloat16 and np.array_equal(params["embedding"], embedding)
        assert jax.tree.all(jax.tree.map(np.array_equal, params["blocks"], whole["blocks"]))


def test_a_dry_run_writes_nothing(qwen, tmp_path):
    for command in ("import-hf", "export-hf"):
        told = call(command, qwen, f"output={tmp_path / 'out'}", "--dry-run")
        assert told.status == 0 and "would" in told.out and not list(tmp_path.iterdir()), told.err


def test_other_weights_are_another_model(qwen, tmp_path):
    """A reference kept for one is not taken for the other."""
    from ctllm_jax.training.checkpoints.checkpoint import identify_model

    shutil.copytree(qwen, tmp_path / "copy")
    same = [identify_model(find_checkpoint(str(folder))[1]) for folder in (qwen, tmp_path / "copy")]
    assert same[0] == same[1]
    file = sorted((tmp_path / "copy").glob("*.safetensors"))[-1]
    tensors = read_tensors(file)
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name] = (tensors[name] * 1.5).astype(tensors[name].dtype)
    write_tensors(file, tensors)
    assert identify_model(find_checkpoint(str(tmp_path / "copy"))[1]) != same[0]


def change_weights(folder, change):
    file = sorted(Path(folder).glob("*.safetensors"))[0]
    tensors = read_tensors(file)
    change(tensors)
    write_tensors(file, tensors)


def without_norm(tensors):
    del tensors["model.layers.0.input_layernorm.weight"]


def with_more(tensors):
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)


def with_other_shape(tensors):
    tensors["model.layers.0.input_layernorm.weight"] = np.ones(7, np.float32)


CONFIG = {
    "architecture": ({"architectures": ["MixtralForCausalLM"]}, "the architecture MixtralForCausalLM is not known"),
    "scaled": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
               'rope_parameters={"rope_type": "yarn"'),
    "scaled-v4": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
                  'rope_scaling={"type": "linear", "factor": 2.0}: positions are not scaled'),
    "gelu": ({"hidden_act": "gelu"}, 'hidden_act="gelu": the feed-forward is SwiGLU'),
    "some-layers": ({"use_sliding_window": True, "layer_types": None, "max_window_layers": 1},
                    "max_window_layers=1: the sliding window is that of every layer, or of none"),
    "layer-types": ({"use_sliding_window": True, "sliding_window": 9,
                     "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types="),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config="),
    "no-layers": ({"num_hidden_layers": None}, "must give num_hidden_layers as whole numbers"),
    "heads": ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
    "width": ({"intermediate_size": 95}, "model.layers.0.mlp.gate_proj.weight: [96, 64] there, [95, 64] by config"),
    "too-few-rows": ({"vocab_size": 300}, "gives ids up to 399, and"),
}


@pytest.mark.parametrize("case", CONFIG)
def test_what_cannot_be_computed_is_refused_by_name(qwen, tmp_path, case):
    changes, message = CONFIG[case]
    shutil.copytree(qwen, tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", **changes)
    refused(tmp_path, message)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: next(folder.glob("model-00002*")).unlink(), "is not whole: model-00002-of-"),
    (lambda folder: [path.unlink() for path in folder.glob("model*")], "has no weights: neither model.safetensors nor"),
    (lambda folder: next(folder.glob("model-00002*")).write_bytes(b"x" * 99), "is not a safetensors file"),
    (lambda folder: cut_short(next(folder.glob("model-00002*"))), "is cut short or damaged"),
    (lambda folder: change_weights(folder, without_norm), "has no such tensor"),
    (lambda folder: change_weights(folder, with_more), "q_norm.weight: this architecture has no such tensor"),
    (lambda folder: change_weights(folder, with_other_shape), "input_layernorm.weight: [7] there, [64] by config.json"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer: neither tokenizer.model nor"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is malformed"),
    (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
], ids=["missing-shard", "no-weights", "no-safetensors", "cut-short", "missing-tensor", "more-tensors", "shape",
        "no-tokenizer", "malformed", "no-config"])
def test_a_damaged_folder_is_said_in_a_line(qwen, tmp_path, damage, message):
    shutil.copytree(qwen, tmp_path / "hf")
    damage(tmp_path / "hf")
    refused(tmp_path, message)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def refused(tmp_path, message):
    """import-hf on `tmp_path`/hf says `message`, and writes nothing."""
    printed = call("import-hf", tmp_path / "hf", f"output={tmp_path / 'run'}")
    assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err, printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(("words", "message"), [
    (["export-hf", "{qwen}", "output={qwen}"], "is there already: name a new directory"),
    (["export-hf", "{qwen}", "output=out", "adapters=true"], "has no adapters, it is a whole model"),
    (["export-hf", "{qwen}", "output=out", "base_model=x"], "base_model is only read with adapters=true"),
    (["export-hf", "{qwen}", "output=out", "adapters=true", "dtype=bfloat16"], "dtype is not read with adapters=true"),
    (["export-hf", "{qwen}", "output=out", "dtype=int8"], "dtype"),
    (["export-hf", "nowhere", "output=out"], "a MODEL is a run directory, RUN@STEP, or a Hugging Face folder"),
    (["import-hf", "nowhere", "output=out"], "nowhere is no Hugging Face model: it is no directory"),
    (["import-hf", "{qwen}"], "output: must be given")])
def test_a_wrong_command_is_said_in_a_line(qwen, words, message):
    printed = call(*(word.format(qwen=qwen) for word in words))
    assert printed.status == 2 and message in printed.err and "Traceback" not in printed.err


def test_a_template_that_cannot_be_trained_with_is_kept_out(qwen, tmp_path):
    """The model still completes texts; what needs the template says why there is none."""
    shutil.copytree(qwen, tmp_path / "hf")
    edit(tmp_path / "hf" / "tokenizer_config.json", chat_template=CHATML.replace("<|im_end|>", "###"))
    (tmp_path / "hf" / "chat_template.jinja").unlink(missing_ok=True)
    printed = call("import-hf", tmp_path / "hf", f"output={tmp_path / 'run'}")
    assert printed.status == 0 and "chat template: none" in printed.out and "launch.py generate" in printed.out
    data = write_dialogues(tmp_path / "zh.jsonl")
    tuned = call("sft", "quickstart/sft", f"init={tmp_path / 'run'}", f"data.sources.zh={data}", "data.template=null",
                 f"run.dir={tmp_path / 'sft'}", *SMALL)
    assert tuned.status == 2 and "has a chat template that cannot be trained with" in tuned.err
    assert "no special token ends an answer" in tuned.err and "give data.template" in tuned.err


def test_an_interrupted_export_leaves_nothing(qwen, tmp_path, monkeypatch):
    from ctllm_jax.training import conversion

    def fail(*_):
        raise UserError("the gate is shut")

    monkeypatch.setattr(conversion, "check_tokenizer", fail)
    printed = call("export-hf", qwen, f"output={tmp_path / 'out'}")
    assert printed.status == 2 and "the gate is shut" in printed.err and not list(tmp_path.iterdir())
