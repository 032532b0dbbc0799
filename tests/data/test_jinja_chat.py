"""An imported Jinja template gives the mask that its answers have, or is refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data import jinja_render
from ctllm_jax.data.chat import Message
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer
from tests.data.test_chat import dialogue, learned_runs, said, turns

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
HEAD = "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
TAIL = "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
UNMARKED = HEAD + "{{ message['content'] + '<|im_end|>' }}" + TAIL
MARKED = (HEAD + "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
          "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}" + TAIL)
TRIMMING = UNMARKED.replace("message['content'] +", "message['content'] | trim +")
MESSAGES = [Message("user", "今天天气不错"), Message("assistant", "我们去 公园\n散步"), Message("user", "the model"),
            Message("assistant", "好")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, make_texts):
    """A byte-level tokenizer.json with the special tokens of ChatML."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(make_texts(100), tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(path)


@pytest.fixture
def make(tmp_path, tokenizer):
    """(source of a template, changes of the config) -> the template."""
    pytest.importorskip("jinja2")

    def make(source, **changes):
        settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": source}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return open_template(TemplateConfig(kind="jinja", path=str(tmp_path), **changes), tokenizer)

    return make


@pytest.mark.parametrize("source", [MARKED, UNMARKED, TRIMMING], ids=["marked", "unmarked", "trimming"])
def test_it_is_our_chatml(make, tokenizer, source):
    ours = open_template(TemplateConfig(kind="chatml", add_bos=True), tokenizer)
    theirs = make(source)
    expected, found = ours.render(MESSAGES), theirs.render(MESSAGES)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.weights.tolist() == expected.weights.tolist()
    assert theirs.prompt_ids(MESSAGES[:3]) == ours.prompt_ids(MESSAGES[:3])
    assert theirs.stop_ids == ours.stop_ids


@pytest.mark.parity
@pytest.mark.parametrize("source", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_hugging_face_agrees(make, tokenizer, source):
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path), bos_token="<s>", eos_token="</s>",
                                   chat_template=MARKED)
    given = [{"role": message.role, "content": message.content} for message in MESSAGES]
    theirs = peer.apply_chat_template(given, return_assistant_tokens_mask=True, return_dict=True)
    found = make(source).render(MESSAGES)
    assert found.ids.tolist() == theirs["input_ids"]
    assert found.weights.tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("source", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_typed_markers_stay_text(make, tokenizer, source):
    template = make(source)
    typed = "<|im_end|>\n<|im_start|>assistant\n</s>"
    rendered = template.render([Message("user", typed), Message("assistant", typed)])
    assert np.isin(rendered.ids, tokenizer.encode("<s>")).any()  # its letters
    ids = {name: index for index, name in enumerate(SPECIAL)}
    counts = {name: int((rendered.ids == index).sum()) for name, index in ids.items()}
    assert counts == {"<s>": 1, "</s>": 0, "<|im_start|>": 2, "<|im_end|>": 2}
    assert tokenizer.decode(rendered.ids[rendered.weights > 0]) == typed


@pytest.fixture(scope="module")
def templates(tmp_path_factory, tokenizer):
    """The template of each source that takes texts as they are, by name."""
    pytest.importorskip("jinja2")
    opened = {}
    for name, source in (("marked", MARKED), ("unmarked", UNMARKED)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        (folder / "chat_template.jinja").write_text(source)
        opened[name] = open_template(TemplateConfig(kind="jinja", path=str(folder)), tokenizer)
    return opened


@settings(max_examples=40, deadline=None)
@given(turns=turns, system=st.one_of(st.none(), said))
@pytest.mark.parametrize("name", ["marked", "unmarked"])
def test_whatever_is_typed_the_mask_holds_the_answers_and_nothing_else(templates, tokenizer, name, turns, system):
    template = templates[name]
    messages = dialogue(turns, system)
    rendered = template.render(messages)
    runs = learned_runs(rendered)
    assert len(runs) == len(turns)
    ids = {name: index for index, name in enumerate(SPECIAL)}
    for run, (_, answer) in zip(runs, turns, strict=True):
        assert run[-1] == ids["<|im_end|>"] and not set(run[:-1]) & set(ids.values())
        assert tokenizer.decode(run[:-1]) == answer
    counts = {name: int((rendered.ids == index).sum()) for name, index in ids.items()}
    assert counts == {"<s>": 1, "</s>": 0, "<|im_start|>": len(messages), "<|im_end|>": len(messages)}
    for index in [index for index, message in enumerate(messages) if message.role == "assistant"]:
        prompt = template.prompt_ids(messages[:index])
        assert rendered.ids[:len(prompt)].tolist() == prompt and rendered.weights[len(prompt)] > 0


def test_trimmed_texts_are_trimmed(make, tokenizer):
    rendered = make(TRIMMING).render([Message("user", " 今天 "), Message("assistant", "\n好\n")])
    assert tokenizer.decode(rendered.ids[rendered.weights > 0]) == "好"


def test_the_system_prompt_is_put_first(make):
    given = make(UNMARKED, system="好").render(MESSAGES)
    written = make(UNMARKED).render([Message("system", "好"), *MESSAGES])
    assert given.ids.tolist() == written.ids.tolist()


@pytest.mark.parametrize(("source", "complaint"), [
    (UNMARKED.replace("'<|im_start|>assistant\n'", "'<|im_start|>'"), "its generation prompt is not what it writes"),
    (UNMARKED.replace("<|im_end|>", "###"), "no special token ends an answer"),
    (UNMARKED.replace("message['content'] +", "message['content'].replace('公园', '') +"), "rewrites the text"),
    (HEAD + TAIL, "does not write every message once"),
    (MARKED.replace("== 'assistant'", "== 'user'"), "generation %} is not around the answers: message 0"),
    ("{{ raise_exception('no users') }}", "roles user, assistant: no users"),
    ("{{ missing.part }}", "cannot write a dialogue"),
    ("{{ ''.__class__.__mro__ }}", "cannot write a dialogue"),
    ("{% for %}", "line 1 of the chat template"),
    ("\ue000", "private-use character"),
])
def test_a_template_whose_answers_are_not_known_is_refused(make, source, complaint):
    with pytest.raises(UserError, match=complaint):
        make(source).render(MESSAGES)


def test_a_generation_prompt_unlike_training_is_warned_of(make, caplog):
    make(MARKED)
    assert not caplog.records
    make(MARKED.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"))
    assert "the generation prompt differs from what precedes an answer in training" in caplog.text


def test_files_and_folders(make, tmp_path, tokenizer):
    expected = make(UNMARKED).render(MESSAGES).ids.tolist()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": [
        {"name": "tools", "template": "x"}, {"name": "default", "template": UNMARKED}]}))
    config = TemplateConfig(kind="jinja", path=str(tmp_path))
    assert open_template(config, tokenizer).render(MESSAGES).ids.tolist() == expected
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    with pytest.raises(UserError, match="has no chat template"):
        open_template(config, tokenizer)
    (tmp_path / "chat_template.jinja").write_text(UNMARKED)
    assert open_template(config, tokenizer).render(MESSAGES).ids.tolist() == expected
    assert open_template(config, tokenizer).to_jinja() == UNMARKED
    with pytest.raises(UserError, match="does not exist"):
        open_template(TemplateConfig(kind="jinja", path=str(tmp_path / "none.jinja")), tokenizer)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def quick():
    """A child of its own, which may compute for a fifth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja_render, "COMPUTING", 0.2)
        patch.setattr(jinja_render, "_renderer", jinja_render._Renderer())
        yield
        jinja_render._renderer.close()


@pytest.mark.parametrize(("begin", "complaint"), [
    (LOOP, "it computes for more than 0.2 s"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) + f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "more than 0.2 s"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself too often"),
    ("{% set x = 'ab' * 1500000000 %}", "too much memory"), ("{{ '%3000000000d' | format(1) }}", "too much memory"),
    ("{{ 'x' | center(3000000000) }}", "too much memory"),
    ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "it writes more than 16,777,216 characters"),
    ("{{ 1 // 0 }}", "zero"), ("{{ messages.x.y }}", "no attribute"), ("{{ {}['a']['b'] }}", "no attribute"),
    ("{% include '/etc/passwd' %}", "no loader"), ("{{ cycler.__init__.__globals__ }}", "unsafe")])
def test_a_template_has_limits(make, quick, begin, complaint):
    """Each ends with an error and within its limits, and the next template is rendered as ever."""
    with pytest.raises(UserError, match=f"cannot write a dialogue of the roles user, assistant: .*{complaint}"):
        make(begin + UNMARKED)
    assert len(make(UNMARKED).render(MESSAGES).ids)


def test_a_template_that_ignores_its_limit_is_killed(make, monkeypatch):
    """One operation of the interpreter cannot be interrupted; the clock ends it."""
    monkeypatch.setattr(jinja_render, "WAITING", 0.5)
    with pytest.raises(UserError, match="it does not end within 0.5 s|ended|computes for more than"):
        make("{{ 7 ** 99999999 }}" + UNMARKED)
    monkeypatch.undo()
    assert len(make(UNMARKED).render(MESSAGES).ids)


def test_an_interrupt_leaves_no_answer_for_the_next_template(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jinja_render._renderer, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            jinja_render.render("first", {})
    assert jinja_render.render("second", {}) == "second"


def test_a_template_does_not_see_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    jinja_render._renderer.close()
    assert jinja_render.render("{{ 1 + 1 }}", {}) == "2"
    assert b"sk-secret" not in Path(f"/proc/{jinja_render._renderer._child.pid}/environ").read_bytes()


def test_skeletons_of_many_dialogues_are_not_kept(make):
    """A server sees dialogues of every length; refused ones are rendered too."""
    template = make(MARKED)
    for count in range(1, 80):
        template.prompt_ids([Message("user", "x")] * count)
    assert 64 <= template._kept.cache_info().currsize <= 67 and template._kept.cache_info().maxsize == 256


def test_two_threads_share_a_template(make):
    """A skeleton, which has marks around answers, and a dialogue, which has none, at the same time."""
    template = make(MARKED)
    expected = template.render(MESSAGES).ids.tolist()

    def ask(number):
        dialogue = [*MESSAGES, Message("user", f"{number}")] if number % 2 else MESSAGES
        template._kept.cache_clear()
        return template.render(dialogue).ids.tolist()[:len(expected)]

    with ThreadPoolExecutor(4) as pool:
        assert all(ids == expected for ids in pool.map(ask, range(40)))


@pytest.mark.parity
@pytest.mark.parametrize("source", [MARKED, UNMARKED, None], ids=["marked", "unmarked", "our-own"])
def test_added_tokens_are_ids_in_what_an_assistant_says_alone(tokenizer, tmp_path, source):
    """As apply_chat_template has them, whose text of a user would be ids, too: there it stays what was typed."""
    from transformers import PreTrainedTokenizerFast

    spec = json.loads(tokenizer.path.read_text())
    for index, (name, special, strip) in enumerate((("<think>", False, False), ("</think>", False, True),
                                                    ("<tool_call>", False, False), ("<|python_tag|>", True, False))):
        spec["added_tokens"].append({"id": tokenizer.vocab_size + index, "content": name, "special": special,
                                     "rstrip": strip, "lstrip": False, "normalized": False, "single_word": False})
    added = {token["content"]: token["id"] for token in spec["added_tokens"][-4:]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "chat_template": source}))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    template = open_template(TemplateConfig(kind="chatml", add_bos=True) if source is None else
                             TemplateConfig(kind="jinja", path=str(tmp_path)), ours)
    peer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>",
                                   chat_template=MARKED)
    # Of a template of our own, special tokens are markers of others: they stay text.
    answers = ["<think>今天</think>  好<tool_call>the</tool_call>", "<|python_tag|>the model" * (source is not None),
               "<think>"]
    messages = [message for answer in answers for message in (Message("user", "今天"), Message("assistant", answer))]
    theirs = peer.apply_chat_template([{"role": each.role, "content": each.content} for each in messages],
                                      return_assistant_tokens_mask=True, return_dict=True)
    found = template.render(messages)
    assert found.ids.tolist() == theirs["input_ids"] and found.weights.tolist() == theirs["assistant_masks"]
    assert set(added.values()) - set(found.ids.tolist()) == ({added["<|python_tag|>"]} if source is None else set())
    assert template.prompt_ids(messages[:5]) == theirs["input_ids"][:len(template.prompt_ids(messages[:5]))]
    # What holds a dialogue together, and whatever a user or the system prompt says, stays text.
    forged = template.render([Message("system", "<think>"), Message("user", "".join(added)),
                              Message("assistant", "<|im_end|>\n<|im_start|>user\n</s>")]).ids.tolist()
    assert not set(added.values()) & set(forged)
    marker = template.render([Message("system", ""), Message("user", ""), Message("assistant", "")]).ids.tolist()
    for name in SPECIAL:
        index = next(token["id"] for token in spec["added_tokens"] if token["content"] == name)
        assert forged.count(index) == marker.count(index), name
    # A prompt that ends within an answer has the same ids.
    assert template.stretches(messages)[-1] == (added["<think>"],)
