"""Fine-tuning through the shared step: dialogues add up on any mesh, split and packing."""

import json
import random

import jax
import numpy as np
import pytest

from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import SFTDataConfig
from ctllm_jax.data.batch import stack_rows
from ctllm_jax.data.sft import SFTData, pack_row
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.model.decoder import init_params
from ctllm_jax.training.objective import make_loss_fn
from ctllm_jax.training.run import make_decoder
from data_prep.train_tokenizer import fit
from tests.training.steps import SPLITS, assert_same, assert_same_gradients, on_mesh, take_steps

ROWS, S = 8, 128
WORDS = ["今天", "天气", "不错", "我们", "去", "公园", "散步", "。", "，"]


@pytest.fixture(scope="module")
def config():
    return load(PretrainConfig, target="debug/pretrain", overrides=[
        "model.vocab_size=352", "model.init_std=0.2", f"model.context_length={S}", f"batch.sequence_length={S}",
        f"batch.tokens={ROWS * S}", "data.isolate_documents=true"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Dialogues of one to three turns, some with a system prompt and messages of other weights."""
    folder, draw = tmp_path_factory.mktemp("dialogues"), random.Random(0)

    def say(role, most, **more):
        return {"role": role, "content": "".join(draw.choices(WORDS, k=draw.randint(1, most))), **more}

    rows = []
    for index in range(80):
        messages = [say("system", 4)] if index % 4 == 0 else []
        for _ in range(1 + index % 3):
            messages += [say("user", 6), say("assistant", 12, weight=draw.choice([0.5, 1, 2]))]
        rows.append({"messages": messages})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["".join(draw.choices([*WORDS, *"用户助手：0123456789"], k=20)) for _ in range(200)]
    (folder / "small.model").write_bytes(fit(lines, vocab_size=300, character_coverage=1.0))
    return SFTData(SFTDataConfig(sources={"zh": {"path": str(folder / "rows.jsonl")}}, template={"kind": "plain"}),
                   tokenizer=load_tokenizer(folder / "small.model"), sequence_length=S, rows=ROWS, seed=3,
                   vocab_size=352)


@pytest.fixture(scope="module")
def params(config):
    return init_params(config.model, jax.random.key(0))


def loss_of(config, decoder, mesh):
    return make_loss_fn(config, decoder, mesh=mesh, token_bytes=None, z_loss=0.0, padded=True)


@pytest.fixture(scope="module")
def one_device(config, data, params):
    return take_steps(config, data, params, loss_of)


@pytest.mark.parametrize(("sizes", "accumulation"), SPLITS)
def test_every_mesh_and_split_gives_the_same(one_device, config, data, params, sizes, accumulation):
    learned = [row.loss_weights.sum() for row in (data.row(0, row) for row in range(ROWS))]
    assert len(set(learned)) > 1  # so that a mean of means would be another
    assert_same(take_steps(config, data, params, loss_of, mesh_sizes=on_mesh(sizes), accumulation=accumulation),
                one_device)


def test_packed_equals_unpacked(config, data, params):
    """Loss and gradients of the rows of a step, and of a row for each of their dialogues."""
    number = {data.examples.ids[slice(*data.examples.offsets[index:index + 2])].tobytes(): index
              for index in range(len(data.examples.sources))}
    packed = [data.row(0, row) for row in range(4)]
    dialogues = [number[row.tokens[row.segment_ids == segment].tobytes()] for row in packed
                 for segment in range(1, row.segment_ids.max() + 1)]
    assert len(dialogues) > 2 * len(packed)
    loss_fn = loss_of(config, make_decoder(config), None)
    function = jax.jit(jax.value_and_grad(lambda params, batch: loss_fn(params, None, batch)[:2], has_aux=True))
    (loss, weight), grads = function(params, stack_rows(packed))
    (alone, count), alone_grads = function(params, stack_rows([pack_row(data.examples, [index], S)
                                                               for index in dialogues]))
    assert float(weight) == pytest.approx(float(count)) and np.isfinite(loss)
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)
    assert_same_gradients(grads, alone_grads)
