"""Tokenizers and chat templates in Hugging Face's files: what is kept of an imported one, what is written, the gate.

A SentencePiece model becomes a tokenizer.json here, because what transformers makes of the .model by itself gives other
ids. No export is done before the written files give our ids. No jax here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import ChatTemplate, Message, Vocabulary, open_template
from ctllm_jax.data.jinja_chat import NAMES, TEMPLATE, added_tokens, read_settings, read_template, token_text
from ctllm_jax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from ctllm_jax.huggingface.architecture import CONFIG, GENERATION, read_json
from ctllm_jax.huggingface.sentencepiece_json import to_tokenizer_json
from ctllm_jax.storage import copy_file, is_remote, local_copy

SETTINGS = "huggingface"
"""Folder of a run directory with the settings and the template of an imported tokenizer."""
PROBES = (
    "今天天气不错，我们去公园散步。", "《红楼梦》第１２回：“满纸荒唐言”——曹雪芹（约1715年—1763年）",
    "繁體字與简体字，混在一起！",
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?", "价格是￥3,999.50，约合 $550 (USD)。",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # 注释\n", "if (i<n&&j>=0){\n\ta[i]+=1;\n}\r\n",
    "😀👩‍👩‍👧‍👦🇨🇳 ❤️", "龘靐齉䨻 ꙮ ʘ\u0301 ½ ﬁ Ａ", "a  b   c\t\td\n\n\n  e", "行一\n行二\n\n　　全角空格",
    "1234567890 3.14159e-10", "https://example.com/a?b=c&d=%E4%BD%A0",
    "Ünïcödé naïve Ελληνικά Русский العربية हिन्दी 日本語 한국어",
    "end with space ",
)
"""Texts that an exported tokenizer must give our ids for."""
_LEADING = (" leading space", "  two", "\n newline first", "\t")
_DIALOGUES = (
    (Message("user", "你好，请介绍一下北京。"), Message("assistant", "北京是中国的首都。"),
     Message("user", "What about 上海?")),
    (Message("system", "你是一个有用的人工智能助手。"), Message("user", "def f(x):\n    return x\n这是什么？")),
)


class Origin(NamedTuple):
    """What a Hugging Face folder says of its tokenizer.

    Attributes:
      tokenizer: the tokenizer.
      size: ids that it and its added tokens can give.
      eod_id: id that ends a document; None: none is known.
      prefix_id: BOS, where the tokenizer puts it before a text.
      template: what a checkpoint says of its template; None: it has none, or it cannot be used.
      problem: why the template cannot be used.
    """

    tokenizer: Tokenizer
    size: int
    eod_id: int | None
    prefix_id: int | None
    template: dict[str, Any] | None
    problem: str | None


def read_tokenizer(directory: Path, *, rows: int) -> Origin:
    """The tokenizer of a Hugging Face folder with `rows` rows of embedding.

    Raises:
      UserError: no tokenizer, two that disagree, or one with more ids than the embedding has rows.
    """
    file = find_tokenizer(directory)
    if file is None:
        raise UserError(f"{directory} has no tokenizer: neither tokenizer.model nor tokenizer.json")
    tokenizer, settings = load_tokenizer(file), read_settings(directory)
    if file.suffix == ".model" and (directory / "tokenizer.json").is_file():
        _check_same(tokenizer, load_tokenizer(directory / "tokenizer.json"))
    size = max([tokenizer.vocab_size, *(index + 1 for index in added_tokens(settings).values())])
    if size > rows:
        raise UserError(f"{file} gives ids up to {size - 1}, and {directory / CONFIG} has vocab_size={rows}: it is the"
                        " tokenizer of another model")
    ends = read_json(directory / CONFIG).get("eos_token_id", read_json(directory / GENERATION).get("eos_token_id"))
    eod_id = next(iter(ends), None) if isinstance(ends, list) else ends
    template, problem = None, None
    if read_template(directory)[0] is not None:
        config = TemplateConfig(kind="jinja", path=str(directory))
        try:
            template = {"config": config.model_dump(mode="json"),
                        "fingerprint": open_template(config, tokenizer).fingerprint()}
        except UserError as error:
            problem = str(error)
    return Origin(tokenizer, size, tokenizer.eos_id if eod_id is None else eod_id,
                  _prefix_id(directory, tokenizer, settings), template, problem)


def keep_settings(run_dir: Path, *, tokenizer: Path, template: str | None) -> None:
    """Keep in a run directory a jinja template, and what an imported tokenizer has beside its file.

    Args:
      tokenizer: its file, in a Hugging Face folder, or in a run directory that keeps such settings.
      template: `template.path` of a jinja template; None: the run has none.
    """
    beside = tokenizer.parent / SETTINGS
    folder = beside if beside.is_dir() else tokenizer.parent
    # A template's own settings decide its ids: no others are mixed in.
    source, settings = read_template(Path(template)) if template else (None, read_settings(folder))
    settings.pop("chat_template", None)
    if not settings and source is None:
        return
    target = run_dir / SETTINGS
    if not is_remote(target):
        target.mkdir(exist_ok=True)
    _write_json(target / "tokenizer_config.json", settings)
    if source is not None:
        (target / TEMPLATE).write_text(source, encoding="utf-8")


def kept_template(run_dir: Path, known: dict[str, Any] | None) -> TemplateConfig | None:
    """The template of a checkpoint (`template` of its `meta`), read from its run directory where that keeps it."""
    if not known:
        return None
    config = TemplateConfig(**known["config"])
    if config.kind == "jinja" and (run_dir / SETTINGS / TEMPLATE).is_file():
        files = [local_copy(run_dir / SETTINGS / name) for name in ("tokenizer_config.json", TEMPLATE)]
        return config.model_copy(update={"path": str(files[0].parent)})
    return config


def write_tokenizer(directory: Path, tokenizer: Tokenizer, template: ChatTemplate | None, *, settings: dict[str, Any],
                    context_length: int, eod_id: int | None, prefix_id: int | None) -> dict[str, Any]:
    """Write tokenizer.json, tokenizer_config.json, the chat template, and a SentencePiece model as it is.

    Returns:
      `bos_token_id`, `eos_token_id` and `pad_token_id` of config.json, those that there are.

    Raises:
      UserError: a tokenizer or a template that these files cannot express.
    """
    vocabulary = Vocabulary(tokenizer)
    if tokenizer.path.suffix == ".model":
        copy_file(tokenizer.path, directory / "tokenizer.model")
        spec = to_tokenizer_json(tokenizer.path, prefix_id=prefix_id, talks=template is not None)
    else:
        spec = json.loads(tokenizer.path.read_bytes()) | {"truncation": None, "padding": None}
    names = dict(vocabulary.pieces) | {index: name for name, index in added_tokens(settings).items()}
    special = {index: name for name, index in added_tokens(settings).items()}
    if template is not None:
        special |= {index: names[index] for index in template.markers if index in names}
    add_special(spec, special)
    (directory / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    stops = [] if template is None else list(template.stop_ids)
    end = next((index for index in (*stops, eod_id, tokenizer.eos_id) if index is not None), None)
    roles = dict(zip(NAMES, (tokenizer.bos_id, end, tokenizer.pad_id, tokenizer.unk_id), strict=True))
    found = {name: names[index] for name, index in roles.items() if index in names}
    if template is not None and template.kind == "jinja":
        # The template may write them.
        found |= {name: token_text(settings[name]) for name in NAMES if settings.get(name) is not None}
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast", **found, "model_max_length": context_length,
        "clean_up_tokenization_spaces": False, "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in spec["added_tokens"]}}
    if template is not None:
        source = template.to_jinja()
        written["chat_template"] = source
        (directory / TEMPLATE).write_text(source, encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", written)
    by_name = {name: index for index, name in names.items()}
    known = {f"{name}_id": by_name[found[name]] for name in NAMES[:3] if found.get(name) in by_name}
    if eod_id is not None:
        known["eos_token_id"] = eod_id
    ends = list(dict.fromkeys(index for index in (*stops, eod_id) if index is not None))
    _write_json(directory / GENERATION, known | ({"eos_token_id": ends} if len(ends) > 1 else {}))
    return known


def check_tokenizer(directory: Path, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    """The gate: the files in `directory` give our ids for PROBES, and the template ours for dialogues.

    Returns:
      What differs without being wrong, a line each: a template whose text Hugging Face tokenizes together with a
      message's.

    Raises:
      UserError: other ids for a text; shows it and both.
    """
    from tokenizers import Tokenizer as Backend

    written = Backend.from_file(str(directory / "tokenizer.json"))
    # Where the dummy prefix is for the beginning alone, a text that begins with a space has one less.
    first = (read_json(directory / "tokenizer.json").get("pre_tokenizer") or {}).get("prepend_scheme") == "first"
    for probe in PROBES if first else (*PROBES, *_LEADING):
        ours, theirs = tokenizer.encode(probe), written.encode(probe, add_special_tokens=False).ids
        if ours != theirs:
            raise UserError(f"the exported tokenizer gives other ids than {tokenizer.path} for {probe!r}: {theirs} in"
                            f" place of {ours}")
    if template is None:
        return []
    read = open_template(TemplateConfig(kind="jinja", path=str(directory)),
                         load_tokenizer(directory / "tokenizer.json"))
    for messages in _DIALOGUES:
        try:
            ours = template.prompt_ids(messages)
        except UserError:
            continue  # a template without a place for a system prompt
        theirs = written.encode(read.write(messages, prompt=True), add_special_tokens=False).ids
        if ours != theirs:
            place = next((index for index, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1),
                         min(len(ours), len(theirs)))
            shown = [[written.id_to_token(index) for index in ids[place:place + 3]] for ids in (theirs, ours)]
            return [f"apply_chat_template gives {shown[0]} where training had {shown[1]}, for a dialogue that begins"
                    f" {messages[0].content!r}: Hugging Face tokenizes the template's text together with the messages'"]
    return []


def add_special(spec: dict[str, Any], tokens: dict[int, str]) -> None:
    """Make ids of a tokenizer.json special tokens of these names, in place."""
    known = {token["id"]: token for token in spec.setdefault("added_tokens", [])}
    for index, name in tokens.items():
        known.setdefault(index, {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                                 "normalized": False, "special": True})["special"] = True
    spec["added_tokens"] = [known[index] for index in sorted(known)]


def _check_same(tokenizer: Tokenizer, other: Tokenizer) -> None:
    for probe in PROBES:
        if tokenizer.encode(probe) != other.encode(probe):
            raise UserError(f"{tokenizer.path} and {other.path.name} give different ids for {probe!r}: remove the one"
                            " that the model was not trained with")


def _prefix_id(directory: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> int | None:
    """BOS where the tokenizer puts it before a text: by its setting, else its tokenizer.json, else its class."""
    adds = settings.get("add_bos_token")
    if adds is None and (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer as Backend

        first = Backend.from_file(str(directory / "tokenizer.json")).encode("a").ids[:1]
        return first[0] if first and first[0] == tokenizer.bos_id else None
    if adds is None:
        adds = str(settings.get("tokenizer_class", "LlamaTokenizer")).startswith("Llama")
    return tokenizer.bos_id if adds else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
