"""A DPO run as a user starts it, beside TRL's DPOTrainer: the same files, weights and AdamW; every step the same."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from ctllm_jax.config.dpo import DPOConfig
from ctllm_jax.config.load import load
from ctllm_jax.data.preference import PreferenceData
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.report.run import read_run
from ctllm_jax.training.dpo import open_stage
from ctllm_jax.training.objective import Objective
from ctllm_jax.training.run import make_decoder
from tests.cli.conftest import call
from tests.model.llama import make_llama, to_llama
from tests.training import trl_peers
from tests.training.trl_peers import say

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

BETA, S, ROWS, EPOCHS, PAIRS = 0.5, 320, 8, 4, 44
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")


def write_pairs(path):
    """Pairs in TRL's own layout: some with a system prompt, some with several turns."""
    draw = random.Random(0)
    rows = []
    for index in range(PAIRS):
        prompt = [{"role": "system", "content": say(draw, 6)}] if index % 3 == 0 else []
        for _ in range(index % 2):
            prompt += [{"role": "user", "content": say(draw, 6)}, {"role": "assistant", "content": say(draw, 8)}]
        prompt.append({"role": "user", "content": f"{index}{say(draw, 6)}"})
        rows.append({"prompt": prompt, **{side: [{"role": "assistant", "content": say(draw, 12)}]
                                          for side in ("chosen", "rejected")}})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


class Both(NamedTuple):
    """Our run and what it was made of, the pairs of each step, the weights before, and TRL's trainer behind its own."""

    directory: Path
    config: DPOConfig
    data: PreferenceData
    objective: Objective
    batches: list
    before: dict
    trainer: Any


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    import datasets
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    from tests.data.hugging_face import make_tokenizer

    folder = tmp_path_factory.mktemp("dpo")
    trl_peers.save_model(folder / "base")
    rows = write_pairs(folder / "pairs.jsonl")
    words = ["dpo", "quickstart/dpo", f"init={folder / 'base'}", f"data.sources.zh={folder / 'pairs.jsonl'}",
             "data.template.kind=baichuan2", "data.template.system=你是一个助手。",
             f"run.dir={folder / 'run'}", f"batch.sequence_length={S}", f"batch.tokens={ROWS * S}", "warmup_ratio=null",
             f"loss.beta={BETA}", f"data.epochs={EPOCHS}", *trl_peers.OVERRIDES]
    printed = call(*words)
    assert printed.status == 0, printed.err
    config, data, objective, *_ = open_stage(load(DPOConfig, target=words[1], overrides=words[2:]))
    data.reference_logps = np.arange(2 * len(data), dtype=np.float32)  # the answer's number, for a moment
    batches = []
    for step in range(data.steps):
        known = next(data.iterate(step, local_rows=range(ROWS))).preference
        chosen = known.reference_logps[(known.pair_ids > 0) & known.is_chosen]
        batches.append((chosen.astype(int) // 2).tolist())
    data.reference_logps = np.load(reference_file(folder))["logps"]
    before = trl_peers.read_params(folder / "base", config.model)
    llamas = [make_llama(config.model, before) for _ in range(2)]
    tokenizer = make_tokenizer(load_tokenizer(data.tokenizer_path), data.template, eos_token="</s>", pad_token="<unk>")
    trainer = trl_peers.in_our_order(DPOTrainer, batches)(
        *llamas, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows),
        args=TRLConfig(**trl_peers.settings(folder / "trl"), beta=BETA, num_train_epochs=1))
    trainer.train()
    return Both(folder / "run", config, data, objective, batches, before, trainer)


def reference_file(folder):
    [file] = (folder / "pairs.jsonl.reference").iterdir()
    return file


def test_the_tokens_are_the_same(both):
    assert len(both.trainer.train_dataset) == len(both.data) == PAIRS
    for pair, row in enumerate(both.trainer.train_dataset):
        for answer, side in ((2 * pair, "chosen_ids"), (2 * pair + 1, "rejected_ids")):
            here = slice(*both.data.answers.offsets[answer:answer + 2])
            assert both.data.answers.ids[here].tolist() == row["prompt_ids"] + row[side]
            expected = [0] * len(row["prompt_ids"]) + [1] * len(row[side])
            assert both.data.answers.weights[here].tolist() == expected


def test_the_reference_logps_are_the_same(both):
    """Ours from packed rows, kept in a file."""
    rows = [both.trainer.train_dataset[pair] for pair in range(PAIRS)]
    inputs = both.trainer.data_collator(rows)
    sides = both.trainer.compute_ref_log_probs(both.trainer.ref_model, inputs)
    kept = np.load(reference_file(both.directory.parent))["logps"]
    for theirs, ours in zip(sides, (kept[::2], kept[1::2]), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)
        assert ours.std() > 1


def test_every_step_is_the_same(both):
    """Loss, gradient norm, and TRL's metrics under TRL's names, over several epochs of packed rows."""
    ours = read_run(both.directory).train
    theirs = [record for record in both.trainer.state.log_history if "loss" in record]
    assert len(ours) == len(theirs) == len(both.batches) >= 8
    assert max(map(len, both.batches)) > 2 * ROWS and len(set(map(len, both.batches))) > 1
    assert ours[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert ours[-1]["loss"] < 0.6 and ours[-1]["rewards/accuracies"] > 0.8
    for step, (mine, other, batch) in enumerate(zip(ours, theirs, both.batches, strict=True)):
        assert mine["pairs"] == len(batch)
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5), step
        assert mine["grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-4), step
        for name in METRICS:
            # While policy and reference are equal, which of two answers is ahead is a matter of rounding.
            if step or name != "rewards/accuracies":
                assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-4), (step, name)


def test_the_weights_have_moved_alike(both):
    after = trl_peers.read_params(both.directory, both.config.model)
    trl_peers.assert_same_weights(both.config.model, after, both.before, both.trainer.model, within=5e-3)


def test_the_gradients_of_a_trained_policy_are_the_same(both):
    """Of the objective that the run was trained on, against autograd through TRL's loss, policy unlike reference."""
    import torch

    model = both.config.model
    after = trl_peers.read_params(both.directory, model)
    llama = both.trainer.model
    llama.load_state_dict({name: torch.tensor(x) for name, x in to_llama(model, after).items()})
    llama.train()
    loss_fn = both.objective.make_loss_fn(both.config, make_decoder(both.config), None)
    batch = next(both.data.iterate(0, local_rows=range(ROWS)))

    def mean(params):
        loss, pairs, _ = loss_fn(params, None, batch)
        return loss / pairs

    loss, grads = jax.jit(jax.value_and_grad(mean))(after)
    llama.zero_grad()
    inputs = both.trainer.data_collator([both.trainer.train_dataset[pair] for pair in both.batches[0]])
    expected = both.trainer.compute_loss(llama, inputs)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), abs=1e-5) and float(loss) < 0.6
    trl_peers.assert_same_gradients(model, grads, llama)
