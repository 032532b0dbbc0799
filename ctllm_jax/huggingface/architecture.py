"""config.json of the Llama family, in and out: Llama, Mistral and dense Qwen2 are our decoder with other switches.

Whatever our decoder cannot compute is refused by its key, before a weight is read. No jax here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ctllm_jax.config.errors import UserError
from ctllm_jax.config.model import ModelConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
"""The classes of transformers that our decoder computes, and their `model_type`."""
_DEFAULTS = {  # defaults of the class of transformers for missing keys
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096 * 32, "sliding_window": 4096,
                "num_key_value_heads": 8},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "sliding_window": 4096,
              "num_key_value_heads": 32},
}

_TYPES = {
    **dict.fromkeys(("architectures", "layer_types"), list),
    **dict.fromkeys(("model_type", "hidden_act"), str),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias"), bool),
    **dict.fromkeys(("sliding_window", "max_window_layers", "num_key_value_heads", "head_dim"), int),
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "initializer_range", "partial_rotary_factor"), (int, float)),
}
"""Required values of keys that are not null; other keys are checked by name, or by the model's schema."""
_UNKNOWN = ("quantization_config", "per_layer_config", "attention_chunk_size", "kv_sharing_modes",
            "transformers_weights")
"""Keys of any class of transformers that change what it computes, or which weights it reads."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file. Raises UserError if it is malformed."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is malformed: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, and holds {type(content).__name__}")
    return content


def read_model_config(directory: Path, *, vocab_size: int) -> ModelConfig:
    """The architecture of a Hugging Face folder; the embedding keeps its number of rows.

    Args:
      vocab_size: ids that the tokenizer can give; rows beyond them are padding. At most `embedding_rows`.

    Raises:
      UserError: the architecture is not one of ARCHITECTURES, or our decoder does not support some keys; all are named.
    """
    path, given = directory / CONFIG, read_json(directory / CONFIG)
    mistyped = [f"{name}={json.dumps(given[name])}" for name, kinds in _TYPES.items()
                if given.get(name) is not None and (not isinstance(given[name], kinds)
                                                    or isinstance(given[name], bool) and kinds is not bool)]
    if mistyped:
        raise UserError(f"{path} is malformed: {', '.join(mistyped)} is of another type than transformers writes")
    kind = _architecture(path, given)
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [name for name in needed if not _is_count(given.get(name))]
    if missing:
        raise UserError(f"{path} must give {', '.join(missing)} as whole numbers above 0")
    problems = _refused(given, kind)
    if problems:
        raise UserError("\n  ".join([f"{path} describes a model that this decoder cannot compute:", *problems]))
    rows, heads = given["vocab_size"], given["num_attention_heads"]
    defaults = {"num_key_value_heads": heads} | _DEFAULTS[kind]
    if "num_key_value_heads" in given:
        defaults["num_key_value_heads"] = heads  # null is no default of the class: as many as heads
    known = defaults | {name: value for name, value in given.items() if value is not None or name == "sliding_window"}
    try:
        return ModelConfig(
            vocab_size=vocab_size, vocab_multiple=_multiple(vocab_size, rows), hidden_size=given["hidden_size"],
            num_layers=given["num_hidden_layers"], num_heads=heads,
            num_kv_heads=known["num_key_value_heads"],
            head_dim=known.get("head_dim", given["hidden_size"] // heads), ffn_size=given["intermediate_size"],
            tie_embeddings=known.get("tie_word_embeddings", False), rope_theta=_rope(given)["rope_theta"],
            norm_eps=known["rms_norm_eps"], qkv_bias=kind == "qwen2", sliding_window=_window(known, kind),
            init_std=known.get("initializer_range", 0.02) or 0.02, context_length=known["max_position_embeddings"])
    except ValidationError as error:
        raise UserError("\n  ".join([f"{path} is no architecture:", *(
            f"{'.'.join(map(str, each['loc'])) or 'model'}: {each['msg']}"
            for each in error.errors(include_url=False))])) from None


def embedding_rows(directory: Path) -> int:
    """Rows of the embedding, including padding. Raises UserError if config.json does not state it."""
    rows = read_json(directory / CONFIG).get("vocab_size")
    if not _is_count(rows):
        raise UserError(f"{directory / CONFIG} must give vocab_size as a whole number above 0")
    return rows


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def describe_architecture(config: ModelConfig, *, rows: int, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
    """config.json as both version 4 and version 5 of transformers read it.

    Args:
      config: the architecture; biases make it a Qwen2, a window without them a Mistral, else it is a Llama.
      rows: of the embedding, as it is written.
      dtype: of the weights.
      ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    kind = "qwen2" if config.qkv_bias else "llama" if config.sliding_window is None else "mistral"
    written = {
        "architectures": [next(name for name, each in ARCHITECTURES.items() if each == kind)],
        "model_type": kind, "vocab_size": rows, "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "hidden_act": "silu", "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "rope_scaling": None, "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_embeddings, "initializer_range": config.init_std, "attention_dropout": 0.0,
        "use_cache": True, "torch_dtype": dtype, "dtype": dtype, **ids,
    }
    if kind == "llama":
        written |= {"attention_bias": False, "mlp_bias": False}
    if kind == "mistral":
        written |= {"sliding_window": config.sliding_window}
    if kind == "qwen2":
        # Layers from max_window_layers on have the window: from the first on all of them, or none.
        window = config.sliding_window
        written |= {"use_sliding_window": window is not None, "sliding_window": window,
                    "max_window_layers": config.num_layers if window is None else 0}
    return written


def _architecture(path: Path, given: dict[str, Any]) -> str:
    names = list(map(str, given.get("architectures") or []))
    by_type = {kind: name for name, kind in ARCHITECTURES.items()}
    if not names and given.get("model_type") in by_type:
        names = [by_type[given["model_type"]]]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        found = ", ".join(map(str, names)) or f"model_type {given.get('model_type')}"
        raise UserError(f"{path}: the architecture {found} is not known; there are {', '.join(ARCHITECTURES)}")
    if given.get("model_type") not in (None, ARCHITECTURES[names[0]]):
        raise UserError(f"{path}: architectures={names[0]} and model_type={given['model_type']} contradict each other:"
                        f" {names[0]} is of model_type={ARCHITECTURES[names[0]]}, and transformers goes by model_type")
    return ARCHITECTURES[names[0]]


def _refused(given: dict[str, Any], kind: str) -> list[str]:
    """A line for each key whose value our decoder does not have."""
    problems = []

    def refuse(name: str, why: str) -> None:
        problems.append(f"{name}={json.dumps(given.get(name))}: {why}")

    for name in _UNKNOWN:
        if given.get(name):
            refuse(name, "weights must be float32, bfloat16 or float16" if name == "quantization_config" else
                   "transformers computes something else with it, which is not known here")
    if not given.get("is_causal", True):
        refuse("is_causal", "a token never sees later ones")
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "the feed-forward is SwiGLU, with silu")
    if kind == "llama" and given.get("attention_bias"):
        refuse("attention_bias", "the attention's output has no bias (Qwen2's, on query, key and value, are known)")
    if kind == "llama" and given.get("mlp_bias"):
        refuse("mlp_bias", "the feed-forward has no bias")
    name, rope = "rope_scaling" if given.get("rope_scaling") else "rope_parameters", _rope(given)
    if rope.get("rope_type", rope.get("type", "default")) != "default" or any(
            isinstance(value, dict) for value in rope.values()):
        refuse(name, "positions are not scaled, and each layer has the same frequencies")
    elif not isinstance(rope["rope_theta"], (int, float)) or isinstance(rope["rope_theta"], bool):
        refuse(name if given.get(name) else "rope_theta", "rope_theta must be a number")
    for source in (given, rope):
        if source.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(f"partial_rotary_factor={source['partial_rotary_factor']}: the whole head is rotated")
    known = _DEFAULTS[kind] | given
    windowed, kinds = _layer_windows(known, kind), known.get("layer_types")
    if kind == "llama" and known["sliding_window"] is not None:
        refuse("sliding_window", "a Llama has none, and transformers applies it to the cache alone")
    if len(set(windowed)) > 1:
        refuse("layer_types" if kinds is not None else "max_window_layers",
               "the sliding window is that of every layer, or of none")
    elif kinds is not None and kinds != [("full_attention", "sliding_attention")[each] for each in windowed]:
        refuse("layer_types", f"it contradicts sliding_window={json.dumps(known['sliding_window'])} of"
                              f" num_hidden_layers={len(windowed)} layers")
    return problems


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of RoPE, wherever this version of transformers put them; its `rope_scaling` hides `rope_parameters`."""
    return {"rope_theta": given.get("rope_theta", 10_000.0)} | (
        given.get("rope_scaling") or given.get("rope_parameters") or {})


def _layer_windows(known: dict[str, Any], kind: str) -> list[bool]:
    """Whether each layer has the window."""
    layers = range(known["num_hidden_layers"])
    if kind == "llama" or known["sliding_window"] is None or kind == "qwen2" and not known.get("use_sliding_window"):
        return [False for _ in layers]
    if kind == "mistral":
        return [True for _ in layers]
    kinds = known.get("layer_types")
    if kinds is not None:
        return [each == "sliding_attention" for each in kinds]
    return [layer >= known.get("max_window_layers", 28) for layer in layers]


def _window(known: dict[str, Any], kind: str) -> int | None:
    return known["sliding_window"] if any(_layer_windows(known, kind)) else None


def _multiple(vocab_size: int, rows: int) -> int:
    """A `vocab_multiple` that pads `vocab_size` to `rows`; 128 if possible."""
    return next(multiple for multiple in (128, 64, 1, rows) if -(-vocab_size // multiple) * multiple == rows)
