"""transformers' tokenizer of the same pieces as one of ours, with a template exported to it."""

from pathlib import Path


def make_tokenizer(tokenizer, template, **tokens):
    """A PreTrainedTokenizerFast with the names of the template's markers special; `tokens`: eos_token and the like."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if Path(tokenizer.path).suffix == ".json":
        backend = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    else:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
        vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        merged = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) > 1]
        merges = [(piece.piece[:cut], piece.piece[cut:]) for piece in sorted(merged, key=lambda piece: -piece.score)
                  for cut in range(1, len(piece.piece)) if {piece.piece[:cut], piece.piece[cut:]} <= vocab.keys()]
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    names = [template._vocabulary.pieces[marker] for marker in template._markers]
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template.to_jinja(), **tokens)
