"""A SentencePiece BPE model as the tokenizer.json that gives the same ids. No jax here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctllm_jax.config.errors import UserError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space as this character
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of a piece
_BPE = 2  # trainer_spec.model_type


def to_tokenizer_json(path: Path, *, prefix_id: int | None, talks: bool) -> dict[str, Any]:
    """The content of tokenizer.json.

    Args:
      path: the .model.
      prefix_id: BOS, if it is to be put before every text; None: nothing is.
      talks: the dummy prefix, if the model has one, must not follow the markers of a dialogue. (It is then for
        the beginning alone, as with symbols of the user's own, and a text that begins with a space has one space less
        than SentencePiece gives it.)

    Raises:
      UserError: a model of another kind than BPE, or options that tokenizer.json has no counterpart of.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    refused = [name for name, found in (
        ("model_type (only bpe is written)", trainer.model_type != _BPE),
        (f"normalization {normalizer.name}", bool(normalizer.precompiled_charsmap)),
        ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces),
        ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix)) if found]
    if refused:
        raise UserError(f"{path} cannot be written as tokenizer.json: {', '.join(refused)}")
    pieces = list(model.pieces)
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    unknown = next(piece.piece for piece in pieces if piece.type == _UNKNOWN)
    prefix = normalizer.add_dummy_prefix
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    pre_tokenizer = None
    if prefix and (talks or any(piece.type == _USER_DEFINED for piece in pieces)):
        pre_tokenizer = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "first", "split": False}
        normalizers = []
    elif prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
    decoders = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    # A symbol is looked for after normalization: with a space as such it is never found.
    added = [{"id": index, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": _SPACE in piece.piece, "special": piece.type != _USER_DEFINED}
             for index, piece in enumerate(pieces)
             if piece.type in (_UNKNOWN, _CONTROL) or piece.type == _USER_DEFINED and " " not in piece.piece]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": pre_tokenizer, "post_processor": _put_before(pieces, prefix_id),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": trainer.byte_fallback,
                  "ignore_merges": False, "vocab": vocab, "merges": _merges(pieces, vocab)}}


def _merges(pieces: list[Any], vocab: dict[str, int]) -> list[str]:
    """The pairs that make a piece, the best piece first; SentencePiece merges the pair that makes the best piece."""
    made = [(piece.piece, piece.score) for piece in pieces if piece.type == _NORMAL and len(piece.piece) > 1]
    usable = {piece.piece for piece in pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    merges = []
    for piece, _ in sorted(made, key=lambda each: -each[1]):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        # As one text each, which older versions read too; no piece has a space.
        merges += [" ".join(pair) for pair in sorted((pair for pair in pairs if usable.issuperset(pair)),
                                                     key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    return merges


def _put_before(pieces: list[Any], prefix_id: int | None) -> dict[str, Any] | None:
    if prefix_id is None or prefix_id >= len(pieces) or pieces[prefix_id].type != _CONTROL:
        return None
    name = pieces[prefix_id].piece
    first, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": name, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, *second],
            "special_tokens": {name: {"id": name, "ids": [prefix_id], "tokens": [name]}}}
