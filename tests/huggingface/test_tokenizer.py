"""Tokenizers in Hugging Face's files: transformers gives our ids for whatever is typed; the gate sees what differs."""

import io
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import Message
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.data.vocabulary import Vocabulary
from ctllm_jax.huggingface import tokenizer as files
from tests.small_text import write_texts

pytestmark = pytest.mark.parity
TEXTS = st.text(alphabet=st.sampled_from("今天气不错，。the mod 42\n\t  é😀龘<s>Ａ"), max_size=40)
JINJA = ("{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
         "{{ '</s>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}")
MESSAGES = [Message("user", "今天天气3，the model?"), Message("assistant", "去公园\n散步。"),
            Message("user", "好 naïve 😀")]


def train(path, texts, *, prefix=False, **options):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(**{
        "sentence_iterator": iter(texts), "model_writer": model, "vocab_size": 400, "model_type": "bpe",
        "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "minloglevel": 2, "character_coverage": 0.998,
        "user_defined_symbols": ["<|im_start|>", "<|im_end|>", "天气", "a b", "▁▁"][:4 + (not prefix)],
        "add_dummy_prefix": prefix, **options})
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return [line for language in ("zh", "en") for text in write_texts(folder / language, language)
            for line in text.split("\n") if line]


@pytest.fixture(scope="module", params=[False, True], ids=["no-prefix", "prefix"])
def trained(request, tmp_path_factory, texts):
    """A SentencePiece model, with a dummy prefix and without."""
    return train(tmp_path_factory.mktemp("model") / "tokenizer.model", texts, prefix=request.param)


def write(folder, tokenizer, template=None, *, eod_id=2, prefix_id=None):
    ids = files.write_tokenizer(folder, tokenizer, template, settings={}, context_length=512,
                                meta={"eod_id": eod_id, "prefix_id": prefix_id})
    return ids, files.check_tokenizer(folder, tokenizer, template)


def test_sentencepiece_gives_the_same_ids(trained, tmp_path):
    # With a prefix and symbols of the user's own, a first space is lost: the only difference.
    check_ids(tmp_path, trained, shortened=trained.encode("天")[0] == trained.encode(" ")[0])


def test_a_dummy_prefix_alone_gives_the_same_ids(texts, tmp_path):
    ours = train(tmp_path / "other.model", texts, prefix=True, user_defined_symbols=[])
    assert ours.encode("天")[0] == ours.encode(" ")[0]
    check_ids(tmp_path, ours)


def check_ids(folder, ours, *, shortened=False):
    """transformers, on the folder written for our tokenizer, gives its ids; `shortened`: but for a first space."""
    from transformers import AutoTokenizer

    ids, notes = write(folder, ours)
    assert ids == {"bos_token_id": 1, "eos_token_id": 2} and notes == []
    theirs = AutoTokenizer.from_pretrained(folder)

    @settings(deadline=None, max_examples=150)
    @given(TEXTS)
    def check(text):
        # Hugging Face: <s> is the special token, and no prefix is put before a symbol of the user's own.
        if "<s>" not in text and not (shortened and text.startswith((" ", "天气"))):
            assert theirs(text).input_ids == ours.encode(text)
            assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))

    check()
    long = "".join(random.Random(0).choices("今天气不错，。the mod 42\n\té", k=20_000)).lstrip()
    assert theirs(long).input_ids == ours.encode(long)


def test_a_dialogue_has_the_same_ids(trained, tmp_path):
    """Also where the dummy prefix stands before a text, and not behind a marker."""
    from transformers import AutoTokenizer

    template = open_template(TemplateConfig(kind="chatml", system="好"), trained)
    _, notes = write(tmp_path, trained, template)
    assert notes == []
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [message._asdict() for message in MESSAGES]
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked == template.prompt_ids(MESSAGES)
    found = theirs.apply_chat_template(messages[:2], return_dict=True, return_assistant_tokens_mask=True)
    rendered = template.render(MESSAGES[:2])
    assert found["input_ids"] == rendered.ids.tolist()
    assert found["assistant_masks"] == (rendered.weights > 0).astype(int).tolist()
    assert theirs.eos_token == "<|im_end|>" and theirs("the model").input_ids == trained.encode("the model")


def test_bos_is_put_before_a_text_where_it_was(trained, tmp_path):
    from transformers import AutoTokenizer

    write(tmp_path, trained, prefix_id=1)
    assert AutoTokenizer.from_pretrained(tmp_path)("今天").input_ids == [1, *trained.encode("今天")]
    (tmp_path / "config.json").write_text('{"vocab_size": 500, "eos_token_id": [7, 9]}')
    read = files.read_tokenizer(tmp_path, rows=500)
    assert (read.prefix_id, read.eod_id, read.size, read.template) == (1, 7, 400, None)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("config.json", {"eos_token_id": "</s>"}, "eos_token_id=\"</s>\" must be an id or a list of ids"),
    ("generation_config.json", {"eos_token_id": [2, None]}, "must be an id or a list of ids, and None is none"),
    ("generation_config.json", {"temperature": "hot"}, "generation_config.json: temperature='hot'"),
    ("generation_config.json", {"top_p": 1.5}, "generation_config.json: top_p=1.5")])
def test_ids_and_settings_that_are_none_are_refused(trained, tmp_path, file, content, message):
    (tmp_path / "tokenizer.model").write_bytes(trained.path.read_bytes())
    (tmp_path / "config.json").write_text('{"vocab_size": 500}')
    (tmp_path / file).write_text(json.dumps({"vocab_size": 500} | content))
    with pytest.raises(UserError) as refused:
        files.read_tokenizer(tmp_path, rows=500)
    assert message in str(refused.value)


def test_a_marker_without_a_name_of_its_own_becomes_special(trained, tmp_path):
    """As Baichuan2's roles, which are pieces like any other."""
    from transformers import AutoTokenizer

    ids = Vocabulary(trained).ids
    template = open_template(TemplateConfig(user_id=ids["<0xF8>"], assistant_id=ids["<0xF9>"]), trained)
    _, notes = write(tmp_path, trained, template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    found = theirs.apply_chat_template([message._asdict() for message in MESSAGES], add_generation_prompt=True,
                                       return_dict=False)
    assert found == template.prompt_ids(MESSAGES)
    # A system prompt has no marker before it, and so gets the prefix there.
    assert len(notes) == (trained.encode("天")[0] == trained.encode(" ")[0])


def test_a_template_that_is_joined_with_a_text_is_told(trained, tmp_path):
    """One token for the template's last character and the message's first: ids that training never saw."""
    template = open_template(TemplateConfig(kind="plain", plain_user="今{content}\n", plain_assistant="天{content}"),
                             trained)
    messages = (Message("user", "天天气"),)
    files_dialogues, files._DIALOGUES = files._DIALOGUES, (messages,)
    try:
        _, (note,) = write(tmp_path, trained, template)
    finally:
        files._DIALOGUES = files_dialogues
    assert note.startswith("apply_chat_template gives [") and "where training had" in note


def test_added_tokens_come_along(trained, tmp_path):
    """As CT-LLM's: a .model, and three special tokens behind its pieces, in a file of an older layout."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir(), target.mkdir()
    (source / "tokenizer.model").write_bytes(trained.path.read_bytes())
    (source / "config.json").write_text('{"vocab_size": 512, "eos_token_id": 400}')
    (source / "added_tokens.json").write_text(json.dumps({"<|EOD|>": 400, "<|MASK|>": 401, "<|PAD|>": 402}))
    (source / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": "<unk>"}')
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}')
    read = files.read_tokenizer(source, rows=512)
    assert (read.size, read.eod_id, read.prefix_id) == (403, 400, None)
    from transformers import AutoTokenizer

    from ctllm_jax.data.jinja_chat import read_settings

    files.write_tokenizer(target, read.tokenizer, None, settings=read_settings(source), context_length=512,
                          meta={"eod_id": 400})
    theirs = AutoTokenizer.from_pretrained(target)
    assert theirs("今天<|EOD|><|PAD|>").input_ids == [*trained.encode("今天"), 400, 402]
    assert theirs.eos_token == "<|EOD|>" and len(theirs) == 403


KINDS = {"<think>": False, "</think>": False, "<tool_call>": False, "<|mask|>": True}


@pytest.mark.parametrize("layout", ["json", "model"])
def test_added_tokens_stay_of_their_kind(trained, tmp_path, layout):
    """Text that holds a token which is not special keeps it: imported, with the model's own template, and exported."""
    from transformers import AutoTokenizer

    from ctllm_jax.data.jinja_chat import read_settings

    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir(), target.mkdir()
    size = trained.vocab_size
    added = {str(size + place): {"content": name, "special": special, "lstrip": False, "rstrip": name == "</think>",
                                 "normalized": False, "single_word": False}
             for place, (name, special) in enumerate(KINDS.items())}
    if layout == "json":
        write(source, trained)
        spec = json.loads((source / "tokenizer.json").read_text())
        files.add_tokens(spec, {int(index): token for index, token in added.items()})
        (source / "tokenizer.json").write_text(json.dumps(spec))
        (source / "tokenizer.model").unlink()
    else:
        (source / "tokenizer.model").write_bytes(trained.path.read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": added, "eos_token": "</s>", "chat_template": JINJA}))
    (source / "config.json").write_text('{"vocab_size": 512}')
    read = files.read_tokenizer(source, rows=512)
    template = open_template(TemplateConfig(kind="jinja", path=str(source)), read.tokenizer)
    settings = read_settings(source)
    files.write_tokenizer(target, read.tokenizer, template, settings=settings, context_length=512, meta={"eod_id": 2})
    files.check_tokenizer(target, read.tokenizer, template)
    theirs = AutoTokenizer.from_pretrained(target)
    kinds = {token.content: (token.special, token.rstrip) for token in theirs.added_tokens_decoder.values()}
    assert {name: kinds[name] for name in KINDS} == {name: (kind, name == "</think>") for name, kind in KINDS.items()}
    if layout == "model":
        read.tokenizer.name_added(files.spoken_additions(source))
    ids = template.render([Message("user", "天<think>"), Message("assistant", "<think>the</think><|mask|>好")]).ids
    assert [size in ids, size + 1 in ids, size + 2 in ids, size + 3 in ids] == [True, True, False, True]
    said = ids[ids.tolist().index(size):]
    assert theirs.decode(said, skip_special_tokens=True).strip() == read.tokenizer.decode(said.tolist()).strip()
    assert "<think>" in read.tokenizer.decode(said.tolist()) and "mask" not in read.tokenizer.decode(said.tolist())

    spec = json.loads((target / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = True
    (target / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="the exported tokenizer changes the added token|decodes the ids of"):
        files.check_tokenizer(target, read.tokenizer, template)


@pytest.mark.parametrize(("options", "message"), [
    ({"model_type": "unigram"}, "model_type (only bpe is written)"),
    ({"normalization_rule_name": "nmt_nfkc"}, "normalization nmt_nfkc"),
    ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces")])
def test_what_tokenizer_json_cannot_say_is_refused(tmp_path, texts, options, message):
    trained = train(tmp_path / "other.model", texts, vocab_size=360, **options)
    with pytest.raises(UserError, match="cannot be written as tokenizer.json") as refused:
        write(tmp_path, trained)
    assert message in str(refused.value)


def test_the_gate_sees_one_wrong_id(trained, tmp_path):
    write(tmp_path, trained)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][5:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="the exported tokenizer gives other ids than"):
        files.check_tokenizer(tmp_path, trained, None)


def test_two_tokenizers_that_disagree_are_refused(trained, tmp_path):
    write(tmp_path, trained)
    (tmp_path / "config.json").write_text('{"vocab_size": 500}')
    assert files.read_tokenizer(tmp_path, rows=500).tokenizer.path.name == "tokenizer.model"
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"tokenizer.model and tokenizer.json give different ids for"):
        files.read_tokenizer(tmp_path, rows=500)
