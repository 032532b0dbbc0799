"""Models of transformers, taken in, given out and taken in again: the same logits, the same bits."""

import json

import jax
import numpy as np
import pytest

from ctllm_jax.config.chat import ChatConfig
from ctllm_jax.config.generate import GenerateConfig
from ctllm_jax.inference.model import load_model
from ctllm_jax.inference.serving.protocol import Served, read_completions
from ctllm_jax.model.decoder import head_weights
from tests.cli.conftest import call
from tests.huggingface.folders import IDS, SHAPES, edit, make_folder
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


def test_every_id_that_ends_a_text_and_how_it_is_drawn(tmp_path):
    """Ids of config.json and of generation_config.json, and its sampling: imported, in use, and exported."""
    import torch
    from transformers import GenerationConfig

    source = make_folder(tmp_path / "hf", "llama")
    prompt = [11, 12, 13]
    free = source.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 3:].tolist()
    end = next(index for place, index in enumerate(free) if place and index not in free[:place])
    edit(tmp_path / "hf/config.json", eos_token_id=[5, end])
    generation = {"do_sample": True, "temperature": 0.25, "top_k": 7, "top_p": 0.75, "repetition_penalty": 1.5,
                  "max_new_tokens": 99, "pad_token_id": 3}
    edit(tmp_path / "hf/generation_config.json", eos_token_id=[9, end], _from_model_config=None, **generation)
    printed = call("import-hf", tmp_path / "hf", f"output={tmp_path / 'run'}")
    assert f"a document ends with id 5, a text also with id {end}, 9" in printed.out, printed.err
    assert "sampling: temperature=0.25, top_k=7, top_p=0.75, repetition_penalty=1.5" in printed.out
    assert call("export-hf", tmp_path / "run", f"output={tmp_path / 'out'}").status == 0
    ends = {5, 9, end}
    for folder in ("hf", "run", "out"):
        model = load_model(str(tmp_path / folder))
        assert ends <= set(model.stop_ids) and model.stop_id == 5, folder
        assert model.drawing == {name: generation[name] for name in ("temperature", "top_k", "top_p",
                                                                     "repetition_penalty")}, folder
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert ends <= set(written.eos_token_id) and generation.items() <= written.to_dict().items()
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [5, end, 9]

    served = Served("m", model.tokenizer, None, None, None, model.stop_ids, 64, drawing=model.drawing)
    (asked,) = read_completions(served, json.dumps({"model": "m", "prompt": prompt, "max_tokens": 8}).encode()).requests
    assert (asked.temperature, asked.top_k, asked.top_p, asked.repetition_penalty) == (0.25, 7, 0.75, 1.5)
    body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "top_k": -1, "repetition_penalty": 1}
    (asked,) = read_completions(served, json.dumps(body).encode()).requests
    assert (asked.temperature, asked.top_k, asked.repetition_penalty) == (0, None, 1)
    (found,) = model.engine(slots=1, max_length=16).run([asked])
    theirs = load_strictly(tmp_path / "out").generate(torch.tensor([prompt]), generation_config=GenerationConfig(
        eos_token_id=written.eos_token_id, max_new_tokens=8, do_sample=False))[0, 3:].tolist()
    assert theirs == free[:free.index(end) + 1] and [token.id for token in found[0]] == theirs[:-1]

    for schema in (GenerateConfig, ChatConfig):
        assert model.drawn_as(schema()).temperature == 0.25
        assert model.drawn_as(schema(temperature=0.5)).temperature == 0.5
