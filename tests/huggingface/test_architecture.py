"""config.json, key by key: whatever a key is changed to, our logits are transformers', or the key is refused."""

import copy
import json
from functools import cache

import jax
import numpy as np
import pytest

from ctllm_jax.config.errors import UserError
from ctllm_jax.huggingface.architecture import embedding_rows, read_model_config
from ctllm_jax.huggingface.weights import Weights
from ctllm_jax.model.decoder import Decoder, head_weights, init_params
from tests.huggingface.folders import make_model

pytestmark = pytest.mark.parity
ROWS, LAYERS = 48, 2
TOKENS = np.random.default_rng(0).integers(0, ROWS, (1, 24)).astype(np.int32)
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "max_position_embeddings": 64,
        "head_dim": 4}
KINDS = {"llama": {}, "mistral": {"sliding_window": 7}, "qwen2": {"max_window_layers": 28}}
FULL, SLIDING = ["full_attention"] * LAYERS, ["sliding_attention"] * LAYERS
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CASES = {  # name -> what is changed in config.json; None takes a key out, and "null" makes it null
    "rope_scaling hides rope_parameters": {"rope_scaling": YARN},
    "an unscaled rope_scaling hides the base": {"rope_scaling": {"rope_type": "default"},
                                                "rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
    "rope_scaling with its own base": {"rope_scaling": {"type": "default", "rope_theta": 55.0}},
    "an empty rope_scaling": {"rope_scaling": {}},
    "the older name of a scaling": {"rope_parameters": None, "rope_theta": 100.0,
                                    "rope_scaling": {"type": "linear", "factor": 2.0}},
    "a base at the top": {"rope_parameters": None, "rope_theta": 100.0},
    "two bases": {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}, "rope_theta": 100.0},
    "no base": {"rope_parameters": None},
    "a base for each kind of layer": {"rope_parameters": {"full_attention": {"rope_theta": 77.0}},
                                      "layer_types": FULL},
    "not causal": {"is_causal": False},
    "as many key heads as query heads": {"num_key_value_heads": "null"},
    "key heads of the class": {"num_key_value_heads": None},
    "full layers and a window": {"layer_types": FULL, "sliding_window": 5, "use_sliding_window": True},
    "windowed layers": {"layer_types": SLIDING, "sliding_window": 5, "use_sliding_window": True},
    "windowed layers without a window": {"layer_types": SLIDING, "sliding_window": "null"},
    "some windowed layers": {"layer_types": [FULL[0], SLIDING[0]], "sliding_window": 5, "use_sliding_window": True},
    "too few kinds of layers": {"layer_types": FULL[1:], "sliding_window": "null"},
    "a window": {"sliding_window": 5}, "a window in use": {"sliding_window": 5, "use_sliding_window": True,
                                                           "max_window_layers": 0, "layer_types": None},
    "a window from the second layer on": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1,
                                          "layer_types": None},
    "the window of the class": {"sliding_window": None}, "no window": {"sliding_window": "null"},
    "another class than the type": {"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"},
    "another activation": {"hidden_act": "gelu"}, "another name of it": {"hidden_act": "swish"},
    "another epsilon": {"rms_norm_eps": 0.1}, "the epsilon of the class": {"rms_norm_eps": None},
    "layers that differ": {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}},
    "part of a head": {"partial_rotary_factor": 0.5},
}


@cache
def source(kind):
    """(folder's content as JSON, transformers' weights): made once, and never on the disk."""
    model = make_model(kind, rows=ROWS, **TINY, **KINDS[kind])
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    return config, model


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    source(request.param)[1].save_pretrained(tmp_path)
    (tmp_path / "kind").write_text(request.param)
    return tmp_path


def theirs(config, model):
    """transformers' logits of the same weights under this config.json; the error where it has none."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    try:
        made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)),
                                                attn_implementation="eager").float().eval()
        made.load_state_dict(model.state_dict())
        with torch.no_grad():
            return made(torch.tensor(TOKENS).long(), use_cache=False).logits.numpy()
    except Exception as error:  # noqa: BLE001 - whatever it raises, it computes nothing
        return error


_OURS = {}


def ours(folder, config):
    """Our logits, or the refusal. A config that reads as an earlier one has its logits."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        read = read_model_config(folder, vocab_size=min(ROWS, embedding_rows(folder)))
        weights = Weights(folder, read)
    except UserError as refusal:
        return refusal
    key = (folder / "kind").read_text(), read.model_dump_json()
    if key not in _OURS:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = weights.load(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                                           jax.eval_shape(lambda key: init_params(read, key), jax.random.key(0))))
        hidden, _ = jax.jit(Decoder(read, dtype=np.dtype("float32")).apply)({"params": params}, TOKENS)
        _OURS[key] = np.asarray(hidden @ head_weights(params))
    return _OURS[key]


def changed(config, changes):
    return {name: None if value == "null" else value for name, value in (config | changes).items() if value is not None
            or name not in changes}


def compare(folder, config, names, *, lenient=False):
    """What is wrong: other logits, or a refusal that names no changed key. None: nothing is.

    With `lenient`, what transformers cannot compute may be computed here."""
    _, model = source((folder / "kind").read_text())
    found = ours(folder, config)
    if isinstance(found, UserError):
        # Shapes that contradict each other, or the weights, are told by what they should be.
        told = (*(name.removesuffix("s") for name in names), "by config.json", "tensor", "is no architecture")
        named = any(part in str(found) for part in told)
        return None if named else f"refused without its name: {found}"
    expected = theirs(config, model)
    if isinstance(expected, Exception):
        return None if lenient else f"computed, where transformers says {expected!r:.300}"
    error = np.abs(found - expected).max() / np.abs(expected).max()
    return None if error < 1e-4 else f"logits differ by {error:.2g}"


def test_what_a_key_is_changed_to_is_computed_or_refused(folder):
    config, _ = source((folder / "kind").read_text())
    assert compare(folder, config, []) is None, "as it is"
    wrong = {name: found for name, changes in CASES.items()
             if (found := compare(folder, changed(config, changes), changes))}
    assert not wrong, wrong


def variants(value):
    """Other values of about the same type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [0, 1, value + 1, 2 * value, -value, float(value)]
    if isinstance(value, float):
        return [0.0, 1.0, 2 * value + 0.5, -value, 1]
    if isinstance(value, str):
        return ["", "other", 3]
    if isinstance(value, list):
        return [[], value[1:], [*value, *value], value[0] if value else 1]
    if isinstance(value, dict):
        return [{}, 1] + [value | {name: other} for name, each in value.items() for other in [None, *variants(each)]]
    return [True, 1, 0.5, "other", [1], {"a": 1}]


@pytest.mark.slow
def test_every_key_with_every_other_value(folder):
    """All keys that transformers writes, and all that its classes and ours look at, one at a time."""
    config, _ = source((folder / "kind").read_text())
    known = dict.fromkeys(["rope_scaling", "rope_theta", "is_causal", "layer_types", "sliding_window", "head_dim",
                           "use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "per_layer_config",
                           "partial_rotary_factor", "attention_chunk_size", "quantization_config", "pretraining_tp",
                           "is_decoder", "is_encoder_decoder", "num_key_value_heads", "kv_sharing_modes"])
    wrong, counted = {}, 0
    for name, value in (known | config).items():
        for other in (None, "null", *variants(value)):
            counted += 1
            if found := compare(folder, changed(config, {name: other}), [name], lenient=True):
                wrong[f"{name}={other}"] = found
    assert not wrong, wrong
    assert counted > 200
