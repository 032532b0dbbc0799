"""Files and requests that are damaged, or made to do harm: told in a line with a `UserError`, and nothing else happens.

Each reader is given valid input that was changed: bytes put in, taken out and flipped, and JSON in which any value may
have become any other.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.conversations import read_conversations
from ctllm_jax.data.layouts import Dropped, messages_of
from ctllm_jax.data.pairs import read_pairs
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.manifest import read_manifest
from ctllm_jax.huggingface.architecture import embedding_rows, read_model_config
from ctllm_jax.huggingface.shards import ShardReader, write_tensors
from ctllm_jax.inference.serving.protocol import ProtocolError, Served, read_chat, read_completions
from tests.small_text import VOCABULARY, make_corpus

MANY = [100, pytest.param(10_000, marks=pytest.mark.slow)]
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(max_size=10), inner, max_size=4),
                    max_leaves=8)


@st.composite
def changed_bytes(draw, valid):
    """`valid` with up to three stretches replaced."""
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 3))):
        first = draw(st.integers(0, len(data)))
        last = draw(st.integers(first, min(len(data), first + 40)))
        data = data[:first] + draw(st.binary(max_size=12)) + data[last:]
    return data if draw(st.booleans()) else data[:draw(st.integers(0, len(data)))]


@st.composite
def changed_json(draw, valid):
    """`valid`, an object, with one value anywhere in it replaced, taken out, or put beside."""
    tree = json.loads(json.dumps(draw(st.sampled_from(valid))))
    places = []

    def walk(node):
        for key, child in (node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(child, dict | list):
                walk(child)

    walk(tree)
    node, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        node[key] = draw(JSON)
    elif isinstance(node, dict):
        del node[key]
        node[draw(st.text(max_size=10))] = draw(JSON)
    else:
        node.insert(key, draw(JSON))
    return tree


def attack(strategy, examples, read, *, expected=UserError, seen=()):
    """`read` of every example does its work or raises `expected` with a message; all of `seen` raise it."""
    for example in seen:
        with pytest.raises(expected, match=r"."):
            read(example)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(example):
        try:
            read(example)
        except expected as error:
            assert str(error)

    one()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def served(corpus):
    tokenizer = load_tokenizer(corpus.tokenizer)
    template = open_template(TemplateConfig(kind="plain"), tokenizer)
    return Served("m", tokenizer, template, tokenizer.eos_id, tokenizer.eos_id, (tokenizer.eos_id,), 128)


def written(path, data):
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


@pytest.mark.parametrize("examples", MANY)
def test_configs(tmp_path, examples):
    own = b"extends: debug/pretrain\nsteps: 3\nmodel: {num_layers: 2}\n"
    valid = (Path(__file__).parent.parent / "configs/debug/pretrain.yaml").read_bytes(), own

    def read(data):
        load(PretrainConfig, target=written(tmp_path / "c.yaml", data))

    attack(changed_bytes(valid) | st.binary(max_size=200) | changed_json(
        [{"extends": "debug/pretrain", "steps": 3, "optimizer": {"lr": 1e-3}, "sample": {"prompts": ["a"]}}]),
        examples, read)


@pytest.mark.parametrize("examples", MANY)
def test_overrides(examples):
    keys = st.sampled_from(["steps", "optimizer.lr", "data.sources", "model", "run.dir", "mesh.fsdp", "x"]) | st.text()
    words = st.tuples(keys, st.text(max_size=30) | JSON.map(json.dumps)).map("=".join)
    attack(st.lists(words, max_size=3), examples,
           lambda words: load(PretrainConfig, target="debug/pretrain", overrides=words))


DIALOGUES = [{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好。"}]},
             {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好。"}],
              "system": "好"},
             {"instruction": "你好", "input": "", "output": "您好。", "history": [["一", "二"]]}]
PAIRS = [{"prompt": "你好", "chosen": "您好。", "rejected": "不。"},
         {"conversations": [{"from": "human", "value": "你好"}], "chosen": {"from": "gpt", "value": "您好。"},
          "rejected": {"from": "gpt", "value": "不。"}},
         {"instruction": "你好", "input": "", "output": ["您好。", "不。"]},
         {"prompt": "你好", "chosen": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好。"}],
          "rejected": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "不。"}]}]


@pytest.mark.parametrize("examples", MANY)
@pytest.mark.parametrize(("reader", "valid"), [(read_conversations, DIALOGUES), (read_pairs, PAIRS)],
                         ids=["dialogues", "pairs"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines(tmp_path, reader, valid, name, examples):
    lines = [json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in valid]
    arrays = [json.dumps(valid[:1]).encode()]
    attack(changed_bytes(lines + arrays) | changed_json(valid), examples,
           lambda data: reader(written(tmp_path / name, data)),
           seen=[valid[2] | {"history": True}] if valid is DIALOGUES else [])


@pytest.mark.parametrize("examples", MANY)
def test_messages(served, examples):
    def read(messages):
        parsed = messages_of(messages, "messages")
        served.template.prompt_ids(parsed)

    attack(changed_json([DIALOGUES[0]["messages"]]) | JSON, examples, read, expected=(ValueError, Dropped))


@pytest.mark.parametrize("examples", MANY)
@pytest.mark.parametrize(("read", "valid"), [
    (read_completions, {"model": "m", "prompt": ["你好"], "max_tokens": 3, "stop": ["。"], "logprobs": 2}),
    (read_chat, {"model": "m", "messages": DIALOGUES[0]["messages"][:1], "max_tokens": 3, "temperature": 0.5})],
    ids=["completions", "chat"])
def test_requests(served, read, valid, examples):
    bodies = changed_json([valid]).map(lambda body: json.dumps(body).encode())
    attack(bodies | changed_bytes([json.dumps(valid).encode()]), examples, lambda body: read(served, body),
           expected=ProtocolError)


@pytest.mark.parametrize("examples", MANY)
def test_sentencepiece_files(tmp_path, corpus, examples):
    valid = Path(corpus.tokenizer).read_bytes()
    attack(changed_bytes([valid]), examples, lambda data: load_tokenizer(written(tmp_path / "t.model", data)),
           seen=[valid.replace(b"<0x02>", b"<0x0\x80>")])


@pytest.mark.prep
@pytest.mark.parametrize("examples", MANY)
def test_tokenizer_json_files(tmp_path, examples):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, False, False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(["今天 the 天气"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<unk>"], show_progress=False))
    valid = json.loads(backend.to_str())
    attack(changed_json([valid]) | changed_bytes([json.dumps(valid).encode()]), examples,
           lambda data: load_tokenizer(written(tmp_path / "tokenizer.json", data)),
           seen=[valid | {"model": valid["model"] | {"continuing_subword_prefix": "###"}}])  # a panic of Rust


@pytest.mark.parametrize("examples", MANY)
def test_safetensors_headers(tmp_path, examples):
    write_tensors(tmp_path / "model.safetensors", {"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.float16)})
    whole = (tmp_path / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8:end]), whole[end:]

    def packed(tree):
        text = json.dumps(tree).encode()
        return len(text).to_bytes(8, "little") + text + body

    def read(data):
        reader = ShardReader(written(tmp_path / "model.safetensors", data).parent)
        for name, entry in reader.entries.items():
            assert reader.read(name).nbytes == entry.nbytes <= len(body)

    attack(changed_json([header]).map(packed) | changed_bytes([whole]) | JSON.map(packed), examples, read)


@pytest.mark.parametrize("examples", MANY)
def test_configs_of_hugging_face(tmp_path, examples):
    valid = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
             "rope_theta": 1e4, "max_position_embeddings": 512, "tie_word_embeddings": False, "hidden_act": "silu"}
    (tmp_path / "tokenizer.model").write_bytes(b"")

    def read(data):
        written(tmp_path / "config.json", data)
        read_model_config(tmp_path, vocab_size=min(300, embedding_rows(tmp_path)))

    attack(changed_json([valid]) | changed_bytes([json.dumps(valid).encode()]) | JSON, examples, read,
           seen=[valid | {name: value} for name in ("vocab_size", "num_attention_heads") for value in (True, False, 0)])


@pytest.mark.parametrize("examples", MANY)
def test_manifests(tmp_path, corpus, examples):
    folder = corpus.folder / "zh"
    valid = json.loads((folder / "manifest.json").read_bytes())
    attack(changed_json([valid]) | changed_bytes([json.dumps(valid).encode()]) | JSON, examples,
           lambda data: read_manifest(written(tmp_path / "manifest.json", data).parent))


def test_no_file_name_leaves_its_folder(tmp_path, corpus):
    """An index and a manifest name files: never one that is elsewhere."""
    write_tensors(tmp_path / "secret.safetensors", {"a": np.ones(3, np.float32)})
    model = tmp_path / "model"
    model.mkdir()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "..", ".", "", 3, None):
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="index.json"):
            ShardReader(model)
    source = corpus.folder / "zh"
    manifest = json.loads((source / "manifest.json").read_bytes())
    split = next(iter(manifest["splits"].values()))
    split["shards"][0]["file"] = "../zh/" + split["shards"][0]["file"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json: .*\.\./zh"):
        read_manifest(tmp_path)
    for name in ("../t.model", str(tmp_path / "t.model"), "..", ".", "", 3, None):
        manifest = json.loads((source / "manifest.json").read_bytes())
        manifest["tokenizer"]["file"] = name
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"manifest.json: tokenizer.file=.* must be the name of a file beside it"):
            read_manifest(tmp_path)


def test_vocabulary_of_the_corpus_is_what_is_attacked(corpus):
    """The valid input is valid: what is refused above is refused for its change."""
    assert load_tokenizer(corpus.tokenizer).vocab_size == VOCABULARY
    assert read_manifest(corpus.folder / "zh").splits
