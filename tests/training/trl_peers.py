"""What a run of ours and TRL's trainers are given alike: weights, data in one order, AdamW."""

import random

import jax
import numpy as np

from ctllm_jax.config.load import load, to_yaml
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.model.decoder import init_params
from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint, load_params
from ctllm_jax.training.checkpoints.checkpointer import Checkpointer
from ctllm_jax.training.optimizer import make_optimizer
from ctllm_jax.training.state import init_state
from data_prep.train_tokenizer import fit

LR, DECAY, CLIP = 5e-4, 0.1, 1.0
OVERRIDES = [f"optimizer.lr={LR}", "optimizer.schedule=constant", "optimizer.rules=[]", "optimizer.b1=0.9",
             "optimizer.b2=0.95", "optimizer.eps=1e-8", f"optimizer.weight_decay={DECAY}",
             f"optimizer.clip_norm={CLIP}", "compute.scan_layers=true", "sample.every=0", "log.every=1",
             "log.report=false", "checkpoint.every=1000"]


WORDS = ["今天", "天气", "不错", "我们", "去", "公园", "散步", "。", "，", "the", " model", " reads", " text", "\n",
         "42"]


def say(draw, most):
    """A text of one to `most` words, the first of which is none of blanks."""
    return "".join([draw.choice(WORDS[:-2]), *draw.choices(WORDS, k=draw.randint(1, most) - 1)])


def save_model(directory):
    """A run directory with a tiny random model at step 0 and a tokenizer, not taught to answer."""
    config = load(PretrainConfig, target="debug/pretrain", overrides=[
        "model.vocab_size=352", "model.vocab_multiple=32", "model.init_std=0.2", "model.context_length=160",
        "batch.sequence_length=160", "batch.tokens=160"])
    params = init_params(config.model, jax.random.key(7))
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml(config))
    checkpointer = Checkpointer(directory, config.checkpoint, tokens_per_step=1,
                                meta={"fingerprint": {}, "eod_id": None, "prefix_id": None})
    checkpointer.save(init_state(params, make_optimizer(config.optimizer, params)), step=0, last=True)
    checkpointer.close()
    draw = random.Random(0)
    lines = [line for _ in range(300) for line in f"{draw.random()}{say(draw, 40)}".split("\n") if line]
    (directory / "tokenizer.model").write_bytes(fit(lines, vocab_size=330, character_coverage=1.0))


def read_params(directory, model):
    """The weights of a run's newest checkpoint."""
    _, kept = find_checkpoint(str(directory))
    return load_params(kept, jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def settings(directory, **more):
    """TRL's arguments for the optimizer of OVERRIDES, on the CPU, a record of every step."""
    return {"output_dir": str(directory), "learning_rate": LR, "weight_decay": DECAY, "max_grad_norm": CLIP,
            "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "lr_scheduler_type": "constant",
            "gradient_checkpointing": False, "use_cpu": True, "bf16": False, "report_to": "none",
            "save_strategy": "no", "logging_steps": 1, "logging_first_step": True, "disable_tqdm": True,
            "max_length": None, "dataloader_pin_memory": False, **more}


def in_our_order(trainer_class, batches):
    """The trainer, but its batches are these lists of rows of its dataset."""
    class InOurOrder(trainer_class):
        def get_train_dataloader(self):
            from torch.utils.data import DataLoader

            dataset = self._remove_unused_columns(self.train_dataset, description="training")
            return self.accelerator.prepare(DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator))

    return InOurOrder


def assert_same_weights(model, params, before, llama, *, within):
    """Our tree and a Llama's parameters, to `within` of how far each matrix has moved from `before`."""
    from tests.model.llama import to_llama

    ours, start = to_llama(model, params), to_llama(model, before)
    for name, parameter in llama.named_parameters():
        moved = np.abs(ours[name] - start[name]).max()
        assert moved > 1e-4, name
        np.testing.assert_allclose(parameter.detach().numpy(), ours[name], rtol=0, atol=within * moved, err_msg=name)


def assert_same_gradients(model, grads, llama):
    """Our gradients and those that autograd left, to 1e-4 of the largest of each matrix."""
    from tests.model.llama import to_llama

    ours = to_llama(model, grads)
    for name, parameter in llama.named_parameters():
        highest = parameter.grad.abs().max().item()
        assert highest > 1e-6, name
        np.testing.assert_allclose(ours[name], parameter.grad.numpy(), rtol=0, atol=1e-4 * highest, err_msg=name)
