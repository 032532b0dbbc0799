"""A fine-tuning run as a user starts it, beside TRL's SFTTrainer with our exported template: ids, mask, every loss."""

import itertools
import json
import random

import numpy as np
import pytest

from ctllm_jax.config.load import load
from ctllm_jax.config.sft import SFTConfig
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.report.run import read_run
from ctllm_jax.training.sft import open_stage
from tests.cli.conftest import call
from tests.model.llama import make_llama
from tests.training import trl_peers
from tests.training.trl_peers import say

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

S, ROWS, DIALOGUES = 160, 8, 60


def write_dialogues(path):
    """Dialogues of one to four turns, every second with a system prompt."""
    draw, rows = random.Random(1), []
    for index in range(DIALOGUES):
        messages = [{"role": "system", "content": say(draw, 6)}] if index % 2 else []
        for _ in range(1 + index % 4):
            messages += [{"role": "user", "content": f"{index}{say(draw, 6)}"},
                         {"role": "assistant", "content": say(draw, 8)}]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our run, its dialogues, those of each step, the weights before, and TRL's trainer behind its own run."""
    import datasets
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer

    from tests.data.hugging_face import make_tokenizer

    folder = tmp_path_factory.mktemp("sft")
    trl_peers.save_model(folder / "base")
    rows = write_dialogues(folder / "rows.jsonl")
    words = ["sft", "quickstart/sft", f"init={folder / 'base'}", f"data.sources.zh={folder / 'rows.jsonl'}",
             "data.template.kind=baichuan2", "data.template.system=你是一个助手。", f"run.dir={folder / 'run'}",
             f"batch.sequence_length={S}", f"batch.tokens={ROWS * S}", "data.epochs=2", "data.held_out=0",
             "evaluation.every=0", *trl_peers.OVERRIDES]
    printed = call(*words)
    assert printed.status == 0, printed.err
    config, data, *_ = open_stage(load(SFTConfig, target=words[1], overrides=words[2:]))
    number = {data.examples.ids[first:last].tobytes(): index
              for index, (first, last) in enumerate(itertools.pairwise(data.examples.offsets))}
    batches = []
    for step in range(data.steps):
        batch = next(data.iterate(step, local_rows=range(ROWS)))
        batches.append([number[tokens_S[segments_S == segment].tobytes()]
                        for tokens_S, segments_S in zip(batch.tokens, batch.segment_ids, strict=True)
                        for segment in range(1, segments_S.max() + 1)])
    before = trl_peers.read_params(folder / "base", config.model)
    tokenizer = make_tokenizer(load_tokenizer(data.tokenizer_path), data.template, eos_token="</s>", pad_token="<unk>")
    trainer = trl_peers.in_our_order(SFTTrainer, batches)(
        make_llama(config.model, before), processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows),
        args=TRLConfig(**trl_peers.settings(folder / "trl"), num_train_epochs=1, assistant_only_loss=True))
    trainer.train()
    return folder / "run", config, data, batches, before, trainer


def test_ids_and_mask_are_the_same(both):
    *_, data, batches, _, trainer = both
    examples = data.examples
    assert len(trainer.train_dataset) == len(examples.sources) == DIALOGUES
    masked = 0
    for index, row in enumerate(trainer.train_dataset):
        here = slice(*examples.offsets[index:index + 2])
        assert examples.ids[here].tolist() == row["input_ids"]
        ours = np.where(examples.weights[here] > 0, examples.ids[here], -100).tolist()
        assert ours == row["labels"]
        masked += row["labels"].count(-100)
    assert 0.2 < masked / len(examples.ids) < 0.9


def test_every_step_is_the_same(both):
    """The mean over the learned tokens of a packed batch, and the gradient's norm, as AdamW goes on."""
    directory, _, _, batches, _, trainer = both
    ours = read_run(directory).train
    theirs = [record for record in trainer.state.log_history if "loss" in record]
    assert len(ours) == len(theirs) == len(batches) >= 4 and max(map(len, batches)) > ROWS
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.1
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), step
        assert mine["grad_norm"] == pytest.approx(float(other["grad_norm"]), rel=1e-4), step


def test_the_weights_have_moved_alike(both):
    directory, config, _, _, before, trainer = both
    after = trl_peers.read_params(directory, config.model)
    trl_peers.assert_same_weights(config.model, after, before, trainer.model, within=1e-3)
