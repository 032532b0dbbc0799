"""Hugging Face folders as transformers writes them: tiny random models, byte-level and SentencePiece tokenizers."""

import json
import shutil

from tests.small_text import write_texts

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (  # after the one of Qwen2: a default system prompt, no generation markers
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
IDS = 400

SHAPES = {  # name -> (class of transformers, what differs)
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True, "rope_theta": 5e5, "rms_norm_eps": 3e-6, "head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 37, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6, "sliding_window": 64, "max_window_layers": 1}),
    "qwen2-tied-window": ("Qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 50,
                                    "max_window_layers": 0}),
}


def byte_level_tokenizer(path, texts):
    """Like Qwen2's: its pattern, NFC, byte-level BPE, three special tokens behind the vocabulary."""
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, False, False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=IDS - len(SPECIAL), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(path))


def make_model(kind, *, rows, dtype="float32", seed=0, **more):
    """(transformers' model with random weights far from trivial, float32 unless said otherwise)."""
    import torch
    import transformers

    name, changes = SHAPES[kind]
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": rows, "bos_token_id": None,
             "eos_token_id": None, "attn_implementation": "eager"} | changes | more
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (3 / parameter.shape[-1] ** 0.5)
                            if parameter.ndim > 1 else 1 + 0.3 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype)).eval()


def make_folder(folder, kind="qwen2", *, rows=IDS, tokenizer=None, template=CHATML, shard="5GB", settings=(), **more):
    """A folder that transformers saved, with a tokenizer (a file; None: a byte-level one); gives the model."""
    model = make_model(kind, rows=rows, **more)
    model.save_pretrained(folder, max_shard_size=shard)
    if tokenizer is None:
        byte_level_tokenizer(folder / "tokenizer.json", [
            text for language in ("zh", "en") for text in write_texts(folder / "texts", language, count=60)])
        (folder / "texts").unlink()
        given = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                 "chat_template": template}
    else:
        shutil.copyfile(tokenizer, folder / ("tokenizer" + tokenizer.suffix))
        given = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    written = {name: value for name, value in {**given, **dict(settings)}.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return model


def edit(path, **changes):
    """Change keys of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
