"""Tokenizers and chat templates in Hugging Face's files: import, export, and the check of an export.

A SentencePiece model becomes a tokenizer.json here, because what transformers makes of the .model by itself gives other
ids. No export is done before the written files give our ids. No jax here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.generate import GenerateConfig
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import ChatTemplate, Message
from ctllm_jax.data.jinja_chat import NAMES, TEMPLATE, added_tokens, read_settings, read_template, token_text
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from ctllm_jax.data.vocabulary import Vocabulary
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
_NOT_KEPT = ("eos_token_id", "transformers_version", "_from_model_config")
_ADDED = ("single_word", "lstrip", "rstrip", "normalized")
_DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_LEADING = (" leading space", "  two", "\n newline first", "\t")
_DIALOGUES = (
    (Message("user", "你好，请介绍一下北京。"), Message("assistant", "北京是中国的首都。"),
     Message("user", "What about 上海?")),
    (Message("system", "你是一个有用的人工智能助手。"), Message("user", "def f(x):\n    return x\n这是什么？")),
)


class Origin(NamedTuple):
    """The tokenizer settings of a Hugging Face folder.

    Attributes:
      tokenizer: the tokenizer.
      size: ids that it and its added tokens can give.
      eod_id: id that ends a document; None: none is known.
      stop_ids: all ids that end a text, `eod_id` first.
      generation: generation_config.json without `eos_token_id`.
      prefix_id: BOS, where the tokenizer puts it before a text.
      template: the template entry of a checkpoint; None: there is none, or it cannot be used.
      problem: why the template cannot be used.
    """

    tokenizer: Tokenizer
    size: int
    eod_id: int | None
    stop_ids: list[int]
    generation: dict[str, Any]
    prefix_id: int | None
    template: dict[str, Any] | None
    problem: str | None


def read_tokenizer(directory: Path, *, rows: int) -> Origin:
    """The tokenizer of a Hugging Face folder with `rows` rows of embedding.

    Raises:
      UserError: no tokenizer, two that disagree, one with more ids than the embedding has rows, or ids that end a text
        and are none.
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
    generation = read_json(directory / GENERATION)
    stop_ids = list(dict.fromkeys([*_read_ends(directory / CONFIG), *_read_ends(directory / GENERATION)]
                                  or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])))
    kept = {name: value for name, value in generation.items() if name not in _NOT_KEPT and value is not None}
    read_drawing(kept, path=directory / GENERATION)
    template, problem = None, None
    if read_template(directory)[0] is not None:
        config = TemplateConfig(kind="jinja", path=str(directory))
        try:
            template = {"config": config.model_dump(mode="json"),
                        "fingerprint": open_template(config, tokenizer).fingerprint()}
        except UserError as error:
            problem = str(error)
    return Origin(tokenizer, size, next(iter(stop_ids), None), stop_ids, kept,
                  _prefix_id(directory, tokenizer, settings), template, problem)


def read_drawing(generation: dict[str, Any], *, path: Path | None = None) -> dict[str, Any]:
    """The sampling defaults of a generation_config.json, under our names: `temperature`, `top_k`, `stop`, ….

    `do_sample` of false is a temperature of 0. UserError, naming the file `path`, where a value cannot be used.
    """
    stop = generation.get("stop_strings") or []
    found = {name: generation[name] for name in _DRAWING if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0
    if found.get("top_k") == 0:
        found["top_k"] = None
    if stop:
        found["stop"] = [stop] if isinstance(stop, str) else stop
    try:
        GenerateConfig.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{path or GENERATION}: {first['loc'][0]}={first['input']!r}: {first['msg']}") from None
    return found


def _read_ends(path: Path) -> list[int]:
    given = read_json(path).get("eos_token_id")
    ends = given if isinstance(given, list) else [] if given is None else [given]
    if wrong := [end for end in ends if not isinstance(end, int) or isinstance(end, bool) or end < 0]:
        raise UserError(f"{path}: eos_token_id={json.dumps(given)} must be an id or a list of ids, and {wrong[0]!r} is"
                        " none")
    return ends


def keep_settings(run_dir: Path, *, tokenizer: Path, template: str | None) -> None:
    """Store in a run directory a jinja template, and the settings files of an imported tokenizer.

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


def spoken_additions(directory: Path) -> dict[int, str]:
    """Tokens, and no special ones, that the settings of a Hugging Face folder or of a run directory add: id -> text."""
    kept = directory / SETTINGS
    settings = read_settings(kept if (kept / "tokenizer_config.json").is_file() else directory)
    added = settings.get("added_tokens_decoder") or {}
    return {int(index): token["content"] for index, token in added.items() if not token.get("special")}


def write_tokenizer(directory: Path, tokenizer: Tokenizer, template: ChatTemplate | None, *, settings: dict[str, Any],
                    context_length: int, meta: dict[str, Any]) -> dict[str, Any]:
    """Write tokenizer.json, tokenizer_config.json, the chat template, and a SentencePiece model as it is.

    Args:
      meta: the checkpoint's meta: the ids that begin and end a text, and the content of generation_config.json.

    Returns:
      `bos_token_id`, `eos_token_id` and `pad_token_id` of config.json, those that there are.

    Raises:
      UserError: a tokenizer or a template that these files cannot express.
    """
    vocabulary, eod_id, prefix_id = Vocabulary(tokenizer), meta.get("eod_id"), meta.get("prefix_id")
    if tokenizer.path.suffix == ".model":
        copy_file(tokenizer.path, directory / "tokenizer.model")
        spec = to_tokenizer_json(tokenizer.path, prefix_id=prefix_id, talks=template is not None)
    else:
        spec = json.loads(tokenizer.path.read_bytes()) | {"truncation": None, "padding": None}
    names = dict(vocabulary.pieces) | {index: name for name, index in added_tokens(settings).items()}
    added = {int(index): token for index, token in (settings.get("added_tokens_decoder") or {}).items()}
    if template is not None and template.kind != "jinja":  # a jinja template came with tokens that have their kinds
        added |= {index: {**added.get(index, {}), "content": names[index], "special": True}
                  for index in template.markers if index in names}
    add_tokens(spec, added)
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
    ends = list(dict.fromkeys(index for index in (eod_id, *meta.get("stop_ids", ())) if index is not None))
    if ends:
        known["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    ends = list(dict.fromkeys([*stops, *ends]))
    _write_json(directory / GENERATION, known | meta.get("generation", {}) | (
        {"eos_token_id": ends} if len(ends) > 1 else {}))
    return known


def check_tokenizer(directory: Path, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    """The gate: the files in `directory` give our ids for PROBES and decode them to our text, their added tokens are of
    the kind and the settings that ours are, and the template gives our ids for dialogues.

    Returns:
      Differences that are not errors, one line each: a template whose text Hugging Face tokenizes together with a
      message's.

    Raises:
      UserError: other ids for a text, or another text for ids; shows both. An added token of another kind.
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
        if tokenizer.decode(ours) != written.decode(ours):
            raise UserError(f"the exported tokenizer decodes the ids of {probe!r} to {written.decode(ours)!r}")
    made_special = template.markers if template is not None and template.kind != "jinja" else frozenset()
    _check_added(directory, tokenizer, written, others=made_special)
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


def add_tokens(spec: dict[str, Any], tokens: dict[int, dict[str, Any]]) -> None:
    """Add tokens to those of a tokenizer.json, in place; of one that is there already only its kind may change, from
    text to special."""
    known = {token["id"]: token for token in spec.setdefault("added_tokens", [])}
    for index, token in tokens.items():
        special = bool(token.get("special"))
        made = {"id": index, "content": token["content"]} | {
            name: token.get(name, name == "normalized" and not special) for name in _ADDED} | {"special": special}
        known.setdefault(index, made)["special"] |= special
    spec["added_tokens"] = [known[index] for index in sorted(known)]


def _check_added(directory: Path, tokenizer: Tokenizer, written: Any, *, others: frozenset[int]) -> None:
    """Check that added tokens are unchanged, and that decoded text shows the same ones; `others` were made special."""
    source = {} if tokenizer.path.suffix == ".model" else {
        token["id"]: token for token in read_json(tokenizer.path).get("added_tokens", ())}
    for token in read_json(directory / "tokenizer.json")["added_tokens"]:
        index = token["id"]
        if index in others or index == tokenizer.unk_id:
            continue
        given = source.get(index, token)
        changed = [f"{name}: {given.get(name)} before, {token.get(name)} now"
                   for name in ("content", "special", *_ADDED) if given.get(name) != token.get(name)]
        ids = [*tokenizer.encode("天"), index, *tokenizer.encode("the")]
        if index < tokenizer.vocab_size and not changed and tokenizer.decode(ids) != written.decode(ids):
            changed = [f"{tokenizer.decode(ids)!r} before, {written.decode(ids)!r} now, as decoded text"]
        if changed:
            raise UserError(f"the exported tokenizer changes the added token {token['content']!r}:"
                            f" {'; '.join(changed)}")


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
