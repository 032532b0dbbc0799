"""The pieces of a tokenizer by name and kind, and encoders that treat chosen names as text or as ids. No jax."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ctllm_jax.config.errors import UserError
from ctllm_jax.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, add_pieces

_LOOKS_SPECIAL = re.compile(r"<.+>|\[/?[A-Z_]+\]", re.DOTALL)
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # types of a SentencePiece piece


def looks_special(piece: str) -> bool:
    """Whether a piece has a name like `<|end|>` or `[INST]`, which ordinary text does not contain."""
    return _LOOKS_SPECIAL.fullmatch(piece) is not None


class Vocabulary:
    """The pieces of a tokenizer by name, and an encoder of texts that never returns a marker."""

    def __init__(self, tokenizer: Tokenizer):
        self._content = tokenizer.path.read_bytes()
        if hashlib.sha256(self._content).hexdigest() != tokenizer.sha256:
            raise UserError(f"{tokenizer.path} changed while it was in use")
        self.tokenizer = tokenizer
        self._types: dict[int, int] = {}
        self._added: dict[str, bool] = {}
        if isinstance(tokenizer, SentencePieceTokenizer):
            self.pieces = {index: piece.piece for index, piece in enumerate(self._proto().pieces)}
            self._types = {index: piece.type for index, piece in enumerate(self._proto().pieces)}
        else:
            spec = json.loads(self._content)
            vocab = spec["model"]["vocab"]
            items = vocab.items() if isinstance(vocab, dict) else ((entry[0], n) for n, entry in enumerate(vocab))
            self.pieces = {index: piece for piece, index in items}
            self.pieces |= {token["id"]: token["content"] for token in spec.get("added_tokens", ())}
            self._added = {token["content"]: token["special"] for token in spec.get("added_tokens", ())}
        self.ids = {piece: index for index, piece in self.pieces.items()}

    def special_tokens(self) -> dict[str, int]:
        """Name -> id of the pieces that are not text."""
        special = {piece: index for index, piece in self.pieces.items() if self._types.get(index) == _CONTROL}
        special |= {piece: self.ids[piece] for piece, is_special in self._added.items() if is_special}
        named = {index for index, kind in self._types.items() if kind == _USER_DEFINED} | {
            self.ids[piece] for piece in self._added}
        return special | {self.pieces[index]: index for index in named if looks_special(self.pieces[index])}

    def check_marker(self, marker: int, name: str) -> None:
        """Raise UserError if a text could contain this id, or if reserving it would take a piece from texts."""
        piece = self.pieces.get(marker)
        if piece is None or self._types.get(marker) in (_CONTROL, _USER_DEFINED):
            return
        if self._types.get(marker) == _BYTE:
            # These bytes do not occur in UTF-8 text.
            if (byte := int(piece[3:5], 16)) in (0xC0, 0xC1) or byte >= 0xF5:
                return
        elif looks_special(piece) and marker != self.tokenizer.unk_id:
            return
        raise UserError(f"{name}={marker} is the piece {piece!r} of {self.tokenizer.path}, which texts are made of: "
                        "give the id of a reserved piece")

    def spoken_tokens(self, structural: Iterable[int]) -> dict[int, str]:
        """Added tokens that an assistant may write, such as <think> and <tool_call>: all except structural tokens of a
        dialogue and those with a special role (BOS, EOS, padding, unknown)."""
        tokenizer = self.tokenizer
        kept = {*structural, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id}
        added = {self.ids[piece] for piece in self._added} | {
            index for index, kind in self._types.items() if kind == _USER_DEFINED}
        return {index: self.pieces[index] for index in added - kept}

    def is_special(self, token: int) -> bool:
        """Whether the tokenizer omits this id from decoded text."""
        return self._types.get(token) == _CONTROL or self._added.get(self.pieces.get(token, ""), False)

    def text_encoder(self, markers: Iterable[int], spoken: Mapping[int, str] = MappingProxyType({})) -> Tokenizer:
        """A copy of the tokenizer that treats the names of markers, and anything that looks like one, as text.

        SentencePiece's dummy prefix is disabled, because it would put a space at the beginning of each text of a
        dialogue. The names `spoken` are converted to their ids.
        """
        markers = set(markers)
        if isinstance(self.tokenizer, SentencePieceTokenizer):
            proto = self._proto()
            proto.normalizer_spec.add_dummy_prefix = False
            for index, piece in enumerate(proto.pieces):
                if index in spoken:
                    continue
                named = piece.type == _USER_DEFINED and looks_special(piece.piece)
                if named or index in markers and piece.type in (_NORMAL, _USER_DEFINED):
                    piece.type = _CONTROL  # SentencePiece never finds a control piece in a text.
            add_pieces(proto, spoken)
            return SentencePieceTokenizer(self.tokenizer.path, proto.SerializeToString())
        spec = json.loads(self._content)
        for token in spec.get("added_tokens", ()):
            token["special"] |= token["id"] in markers or looks_special(token["content"])
            token["special"] &= token["id"] not in spoken
        return JsonTokenizer(self.tokenizer.path, json.dumps(spec).encode())

    def _proto(self):
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self._content)
