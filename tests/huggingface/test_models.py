"""Models of transformers, taken in, given out and taken in again: the same logits, the same bits."""

import json

import jax
import numpy as np
import pytest

from ctllm_jax.inference.model import load_model
from ctllm_jax.model.decoder import head_weights
from tests.cli.conftest import call
from tests.huggingface.folders import IDS, SHAPES, make_folder
from tests.runs import assert_same_bits, read_arrays

pytestmark = pytest.mark.parity


def logits_of(model, tokens):
    decoder = model.decoder.clone(scan_layers=True)
    return np.asarray(jax.jit(lambda params: decoder.apply({"params": params}, tokens)[0] @ head_weights(params))(
        model.params))


def theirs_of(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


def load_strictly(folder):
    """transformers' model of a folder, with nothing missing, left over, or made anew."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


@pytest.mark.parametrize("kind", SHAPES)
def test_in_and_out_and_in(kind, tmp_path):
    source = make_folder(tmp_path / "hf", kind)
    tokens = np.random.default_rng(0).integers(0, IDS, (1, 512)).astype(np.int32)
    expected = theirs_of(source, tokens)
    direct = load_model(str(tmp_path / "hf"))
    np.testing.assert_allclose(logits_of(direct, tokens), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    for words in (["import-hf", tmp_path / "hf", f"output={tmp_path / 'run'}"],
                  ["export-hf", tmp_path / "run", f"output={tmp_path / 'out'}"],
                  ["import-hf", tmp_path / "out", f"output={tmp_path / 'again'}"]):
        printed = call(*words)
        assert printed.status == 0, printed.err
    assert np.array_equal(theirs_of(load_strictly(tmp_path / "out"), tokens), expected)
    assert_same_bits(read_arrays(tmp_path / "run", 0, "milestones"), read_arrays(tmp_path / "again", 0, "milestones"))
    first, second = load_model(str(tmp_path / "run")), load_model(str(tmp_path / "again"))
    assert jax.tree.all(jax.tree.map(np.array_equal, direct.params, first.params))
    assert first.decoder.config == second.decoder.config
    assert first.template.fingerprint() == second.template.fingerprint()
    assert (first.stop_ids, first.prefix_id) == (second.stop_ids, second.prefix_id)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == first.decoder.config.rope_theta and written["torch_dtype"] == "float32"
