"""Weights are not taken for another function than they were trained as: each field, and tokenizers by what they do."""

import json

from ctllm_jax.config.model import ModelConfig
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.huggingface.sentencepiece_json import to_tokenizer_json
from ctllm_jax.training.joins import model_differences, tokenizer_differences
from data_prep.train_tokenizer import fit

MODEL = ModelConfig(vocab_size=330, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=96)
CHANGES = {"vocab_size": 331, "hidden_size": 64, "num_layers": 3, "num_heads": 2, "num_kv_heads": 4, "head_dim": 16,
           "ffn_size": 64, "tie_embeddings": True, "rope_theta": 5e5, "norm_eps": 1e-6, "qkv_bias": True,
           "sliding_window": 8}
NO_FUNCTION = {"vocab_multiple": 64, "init_std": 0.1, "context_length": 64}


def test_every_field_that_changes_the_function_is_compared():
    assert {*CHANGES, *NO_FUNCTION} == {*ModelConfig.model_fields}, "say of a new field whether it changes the outputs"
    for name, value in CHANGES.items():
        found = model_differences(MODEL, MODEL.model_copy(update={name: value}))
        assert found == [f"model.{name}: {getattr(MODEL, name)} there, {value} here"]
    for name, value in NO_FUNCTION.items():
        assert not model_differences(MODEL, MODEL.model_copy(update={name: value}))


def test_tokenizers_are_compared_by_what_they_do(tmp_path):
    lines = [f"{index} the model 今天天气不错 " + "reads text "[:index % 9] for index in range(60)]
    (tmp_path / "ours.model").write_bytes(fit(lines, vocab_size=300, character_coverage=1.0))
    same = to_tokenizer_json(tmp_path / "ours.model", prefix_id=None, talks=False)
    # Not one piece differs, and still texts have other ids: the space comes back as an underscore.
    other = {**same, "normalizer": None}
    for name, spec in (("same", same), ("other", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(spec))
    (tmp_path / "pieces.model").write_bytes(fit([line[::-1] for line in lines], vocab_size=300, character_coverage=1.0))
    ours, same, other, pieces = (load_tokenizer(tmp_path / name) for name in (
        "ours.model", "same.json", "other.json", "pieces.model"))
    assert not tokenizer_differences(same, ours)
    (found,) = tokenizer_differences(other, ours)
    assert "other ids than" in found
    (found,) = tokenizer_differences(pieces, ours)
    assert "ids differ between" in found and " there, " in found
