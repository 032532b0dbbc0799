"""Any text comes back, and ids stand for as many bytes as the text has."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.tokenizer import load_tokenizer
from data_prep.train_tokenizer import fit

HARD = ["", " ", "\n", "a\n\nb\r\n", "\t\tx", "  a    b  ", "▁", "▁x ▁▁ y▁", "😀\U0001f468\u200d\U0001f469", "\x00\x01",
        "\ufeff你好", "é é", "<s></s><unk>", "<0x0A>", "\U0010ffff\ufffd", "ｆｕｌｌ　ｗｉｄｔｈ", "1234 5,678"]


@pytest.fixture(scope="module")
def json_path(tmp_path_factory, make_texts):
    """A byte-level tokenizer.json with an end token."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(make_texts(100), trainer)
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="module", params=["sentencepiece", "json"])
def tokenizer(request, tokenizer_path):
    """Both kinds."""
    return load_tokenizer(tokenizer_path if request.param == "sentencepiece" else request.getfixturevalue("json_path"))


@pytest.mark.parametrize("text", HARD)
def test_hard_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), max_size=4))
def test_any_text_comes_back(tokenizer, texts):
    lengths = tokenizer.token_bytes()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())


def test_roles(tokenizer):
    bos, eos = (1, 2) if tokenizer.path.suffix == ".model" else (0, 1)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (bos, eos, None)
    assert tokenizer.token_bytes()[[bos, eos]].tolist() == [0, 0]
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes().dtype == np.int32


def test_special_text_in_content_gives_no_special_id(tokenizer):
    ids = tokenizer.encode("<s>a</s>")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_ids_without_text_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("去公园")
    with_others = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.vocab_size + 7]
    assert tokenizer.decode(with_others) == "去公园"
    assert tokenizer.decode(np.asarray(with_others)) == "去公园"


def test_newline_is_one_token_and_digits_stand_alone(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    assert len(tokenizer.encode("\n")) == 1
    assert len(tokenizer.encode("4242")) == 4


def test_pieces_with_byte_fallback_in_json_count_their_bytes(tmp_path):
    pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "好": 3, **{f"<0x{byte:02X}>": byte + 4 for byte in range(256)}}
    spec = {"version": "1.0", "added_tokens": [{"id": 260, "content": "<end>", "single_word": False, "lstrip": False,
                                                "rstrip": False, "normalized": False, "special": True}],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocab, "merges": []}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    tokenizer = load_tokenizer(path)
    text = "a 好 是"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes()[260] == 0


def test_a_dummy_prefix_is_kept_as_the_model_has_it(make_texts, monkeypatch, tmp_path):
    from data_prep import train_tokenizer

    monkeypatch.setitem(train_tokenizer.TRAINING_OPTIONS, "add_dummy_prefix", True)
    path = tmp_path / "prefix.model"
    path.write_bytes(fit(make_texts(50), vocab_size=330, character_coverage=1.0))
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("天气")
    assert tokenizer.decode(ids) == "天气"
    assert tokenizer.token_bytes()[ids].sum() == len("天气".encode()) + 1


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.model", b"not a model", "is not a SentencePiece model"),
    ("tokenizer.model", b"", "is empty"),
    ("tokenizer.json", b"{}", "is not a tokenizer.json"),
    ("tokenizer.bin", b"", r"must end in \.model .* or \.json"),
])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        load_tokenizer(path)
    assert str(path) in str(refused.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no.model does not exist"):
        load_tokenizer(tmp_path / "no.model")
    with pytest.raises(UserError, match="folder without tokenizer.model"):
        load_tokenizer(tmp_path)
