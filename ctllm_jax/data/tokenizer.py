"""Convert text to ids and back: one interface for SentencePiece models and tokenizer.json files. No jax."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctllm_jax.config.errors import UserError
from ctllm_jax.storage import open_path

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space as this character
_ROLES = {  # a tokenizer.json does not state the roles of its special tokens; these common names do
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>"),
    "pad": ("<pad>", "<|PAD|>", "[PAD]", "<|pad|>"),
    "unk": ("<unk>", "[UNK]"),
}


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that represent bytes in GPT-2's vocabularies: the byte itself if printable, else 256 and up."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


class Tokenizer(ABC):
    """The common interface of tokenizers. `vocab_size` counts ids; a missing role has the id None."""

    def __init__(self, path: Path, content: bytes):
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = 0
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.pad_id: int | None = None
        self.unk_id: int | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of a text. No special ids are added, and text that looks like a special token stays text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids. Control ids and unknown ids have no text."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of each id, int32 [vocab_size]; 0 for control ids.

        Over the ids of a text they sum to its length in UTF-8, if the tokenizer loses nothing and adds nothing
        (SentencePiece's dummy prefix adds a space).
        """

    @abstractmethod
    def id_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of an id, possibly part of a character; empty for control and unknown ids."""

    @abstractmethod
    def id_name(self, token: int) -> str:
        """The piece of an id in the vocabulary."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model with its own normalization, dummy prefix and byte fallback."""

    def __init__(self, path: Path, content: bytes):
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        super().__init__(path, content)
        try:
            self._processor = SentencePieceProcessor(model_proto=content)
        # The second error occurs if the message would quote a piece that is not UTF-8.
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a SentencePiece model: {error}") from None
        processor = self._processor
        self.vocab_size = processor.vocab_size()
        roles = (processor.bos_id(), processor.eos_id(), processor.pad_id(), processor.unk_id())
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (None if role < 0 else role for role in roles)
        spec = sentencepiece_model_pb2.ModelProto.FromString(content)
        adds_nothing = not spec.normalizer_spec.add_dummy_prefix and not spec.normalizer_spec.remove_extra_whitespaces
        self._decoder, self._added = processor, {}
        # Ids of the UTF-8 bytes of the space symbol: encoded as a piece, it would be decoded to a space.
        self._space_ids: list[int] | None = None
        if spec.trainer_spec.byte_fallback and adds_nothing:
            self._space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        encoded = self._processor.encode(texts)
        for index, text in enumerate(texts):
            if self._space_ids is not None and _SPACE in text:
                parts = self._processor.encode(text.split(_SPACE))
                encoded[index] = list(parts[0])
                for part in parts[1:]:
                    encoded[index] += self._space_ids + part
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids."""
        known = self._decoder.vocab_size()
        return self._decoder.decode([int(token) for token in ids if 0 <= token < known])

    def name_added(self, added: dict[int, str]) -> None:
        """Assign texts to ids after the model's own pieces; no text is encoded to them."""
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        self._added = {index: name for index, name in added.items() if index >= self.vocab_size}
        if self._added:
            spec = sentencepiece_model_pb2.ModelProto.FromString(self.path.read_bytes())
            add_pieces(spec, self._added)
            self._decoder = SentencePieceProcessor(model_proto=spec.SerializeToString())

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each id, int32 [vocab_size]."""
        processor = self._processor

        def length(token: int) -> int:
            if processor.is_control(token) or processor.is_unknown(token):
                return 0
            if processor.is_byte(token):
                return 1
            return len(processor.id_to_piece(token).replace(_SPACE, " ").encode())

        return np.asarray([length(token) for token in range(self.vocab_size)], np.int32)

    def id_bytes(self, token: int) -> bytes:
        """See `Tokenizer`."""
        processor = self._processor
        if token in self._added:
            return self._added[token].encode()
        if not 0 <= token < self.vocab_size or processor.is_control(token) or processor.is_unknown(token):
            return b""
        piece = processor.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if processor.is_byte(token) else piece.replace(_SPACE, " ").encode()

    def id_name(self, token: int) -> str:
        """See `Tokenizer`."""
        known = 0 <= token < self.vocab_size
        return self._processor.id_to_piece(token) if known else self._added.get(token, f"<id {token}>")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, read by Hugging Face's `tokenizers`."""

    def __init__(self, path: Path, content: bytes):
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise UserError(f"{path} needs the package tokenizers: pip install 'ctllm-jax[prep]'") from None
        super().__init__(path, content)
        try:
            self._spec = json.loads(content)
            self._backend = Backend.from_str(content.decode())
        # The backend raises a bare Exception for anything that it cannot read; a Rust panic is not an Exception.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path} is not a tokenizer.json: {error}") from None
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        ids = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1

        self._added = {token["content"]: token["special"] for token in self._spec.get("added_tokens", ())}
        self._byte_level = '"ByteLevel"' in json.dumps([self._spec.get("pre_tokenizer"), self._spec.get("decoder")])

        def role(name: str) -> int | None:
            return next((ids[token] for token in _ROLES[name] if token in ids), None)

        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (role(name) for name in _ROLES)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids."""
        return self._backend.decode([int(token) for token in ids if 0 <= token < self.vocab_size])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each id, int32 [vocab_size]."""
        return np.asarray([len(self.id_bytes(token)) for token in range(self.vocab_size)], np.int32)

    def id_bytes(self, token: int) -> bytes:
        """See `Tokenizer`."""
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if piece in self._added:
            return b"" if self._added[piece] else piece.encode()
        if self._byte_level:
            return bytes(_BYTE_LEVEL[character] for character in piece)
        if self._spec["model"].get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def id_name(self, token: int) -> str:
        """See `Tokenizer`."""
        return self._backend.id_to_token(token) or f"<id {token}>"


def add_pieces(spec: Any, added: Mapping[int, str]) -> None:
    """Append added tokens of the settings to the proto of a SentencePiece model, as user-defined symbols.

    Ids between them stay unused.
    """
    for index in range(len(spec.pieces), max(added, default=-1) + 1):
        spec.pieces.add(piece=added.get(index, f"<unused {index}>"), type=4 if index in added else 5)


def find_tokenizer(directory: Path) -> Path | None:
    """The tokenizer's file in a run directory or a Hugging Face folder; None if there is none."""
    found = (directory / name for name in ("tokenizer.model", "tokenizer.json"))
    return next((path for path in found if path.is_file()), None)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load the tokenizer from a SentencePiece .model or a tokenizer.json. Raises UserError if it is missing or
    neither."""
    path = open_path(path)
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise UserError(f"tokenizer {path} is a folder without tokenizer.model or tokenizer.json")
        path = found
    if path.suffix not in (".model", ".json"):
        raise UserError(f"tokenizer {path} must end in .model (SentencePiece) or .json (tokenizer.json)")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"tokenizer {path} does not exist") from None
    if not content:
        raise UserError(f"tokenizer {path} is empty")
    return (SentencePieceTokenizer if path.suffix == ".model" else JsonTokenizer)(path, content)
