"""Preference losses of a small Llama against TRL's own trainers: log-probabilities, losses, gradients, metrics.

Ours from packed rows, TRL's from one padded row an answer, both from the same weights.
"""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.config.model import ModelConfig
from ctllm_jax.losses.preference import KINDS, Answers, pair_logps, preference_loss, sequence_logps
from ctllm_jax.model.decoder import Decoder, head_weights, init_params

CONFIG = ModelConfig(vocab_size=192, vocab_multiple=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8, ffn_size=48, context_length=64)
BETA = 0.3
PROMPTS, CHOSEN, REJECTED = (3, 5, 1, 6), (7, 4, 9, 4), (5, 8, 2, 4)
# (pair, is chosen) of each row: both answers of a pair in one, in any order; and one pair a row.
PACKED = [[(2, False), (0, True), (0, False), (2, True)], [(1, True), (3, False), (3, True), (1, False)]]
UNPACKED = [[(pair, True), (pair, False)] for pair in range(4)]


def draw_pairs():
    """(prompt, chosen, rejected) ids of four pairs."""
    draws = np.random.default_rng(0)
    return [tuple(draws.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths)
            for lengths in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]


def draw_params(seed):
    """Matrices far larger than at initialisation, so that log-probabilities differ; norms as they are."""
    params = init_params(CONFIG, jax.random.key(seed))
    return jax.tree.map_with_path(lambda path, x: x if "norm" in path[-1].key else 8 * x, params)


def pack(layout, *, width):
    """tokens, targets, weights, segment_ids, positions [B, width]; pair_ids, is_chosen [B, M]."""
    segments = max(len(row) for row in layout)
    arrays = [np.zeros((len(layout), width), dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)]
    pair_ids, is_chosen = np.zeros((len(layout), segments), np.int32), np.zeros((len(layout), segments), bool)
    pairs = draw_pairs()
    for row, parts in enumerate(layout):
        start = 0
        for index, (pair, chosen) in enumerate(parts):
            prompt, *both = pairs[pair]
            ids = np.array(prompt + both[0 if chosen else 1])
            end = start + len(ids) - 1
            in_answer = np.arange(1, len(ids)) >= len(prompt)
            for array, values in zip(arrays, (ids[:-1], ids[1:], in_answer, index + 1, np.arange(len(ids) - 1)),
                                     strict=True):
                array[row, start:end] = values
            pair_ids[row, index], is_chosen[row, index], start = pair + 1, chosen, end
    return *arrays, pair_ids, is_chosen


@jax.jit
def packed_logps(params, tokens, targets, weights, segment_ids, positions):
    hidden, _ = Decoder(CONFIG).apply({"params": params}, tokens, segment_ids, positions)
    return sequence_logps(hidden, head_weights(params), targets, weights, segment_ids, num_segments=4, chunk_size=16)


class Ours:
    """The policy's log-probabilities of the four pairs, and the way back from them to its parameters."""

    def __init__(self, layout, *, width, policy, reference):
        *arrays, pair_ids, is_chosen = pack(layout, width=width)
        missing = [(0, 0), (0, 4 - pair_ids.shape[1])]
        self.pair_ids, self.is_chosen = np.pad(pair_ids, missing), np.pad(is_chosen, missing)
        self.reference_logps, _ = packed_logps(reference, *arrays)
        (self.logps, self.lengths), self.pull_back = jax.vjp(lambda params: packed_logps(params, *arrays), policy)

    def pairs(self, logps):
        """(chosen, rejected, weights), each [B, M]."""
        return pair_logps(Answers(logps, self.lengths, self.reference_logps), self.pair_ids, self.is_chosen)

    def evaluate(self, *, only=(0, 1, 2, 3), kind, **options):
        """(mean loss, gradient in the parameters, mean metrics) over some of the pairs."""
        def mean_loss(logps):
            chosen, rejected, weights = self.pairs(logps)
            if not KINDS[kind].reference:
                chosen, rejected = (side._replace(reference_logps=None) for side in (chosen, rejected))
            loss, weight, metrics = preference_loss(chosen, rejected, kind=kind, **options,
                                                    weights=weights * np.isin(self.pair_ids - 1, only))
            return loss / weight, metrics

        (loss, metrics), slope = jax.value_and_grad(mean_loss, has_aux=True)(self.logps)
        grad, = self.pull_back((slope, jnp.zeros_like(self.lengths)))
        return float(loss), grad, {name: float(value / metrics["pairs"]) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def weights():
    return draw_params(1), draw_params(2)


@pytest.fixture(scope="module")
def ours(weights):
    policy, reference = weights
    return Ours(PACKED, width=52, policy=policy, reference=reference)


class Theirs:
    """TRL's loss functions on two Llamas of transformers; what they want of a trainer is filled in, nothing more."""

    def __init__(self, policy, reference):
        from trl.trainer.dpo_trainer import DataCollatorForPreference
        from trl.trainer.utils import add_fused_lm_head

        from tests.model.llama import make_llama

        self.policy, self.reference = make_llama(CONFIG, policy), make_llama(CONFIG, reference)
        for llama in (self.policy, self.reference):
            add_fused_lm_head(llama, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        self.collate = DataCollatorForPreference(pad_token_id=0)

    def inputs(self, only=(0, 1, 2, 3)):
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        pairs = draw_pairs()
        return self.collate([dict(zip(names, pairs[pair], strict=True)) for pair in only])

    def logps(self, llama):
        """(chosen, rejected), sums [4], and the answers' lengths."""
        inputs = self.inputs()
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        logps = llama(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
                      fused_lm_head=True).log_probs.sum(dim=1)
        return logps.chunk(2), mask.sum(dim=1).chunk(2)

    def dpo(self, *loss_types, only=(0, 1, 2, 3), loss_weights=(1.0,), label_smoothing=0.0):
        """(loss, metrics) of DPOTrainer."""
        import torch
        from trl import DPOTrainer

        def as_it_is(x):
            return x

        trainer = SimpleNamespace(
            beta=BETA, loss_types=loss_types, loss_weights=loss_weights, label_smoothing=label_smoothing,
            model=self.policy, ref_model=self.reference, precompute_ref_logps=False, ld_alpha=None, use_weighting=False,
            aux_loss_enabled=False, f_divergence_type="reverse_kl", _total_train_tokens=0, _tp_size=1,
            args=SimpleNamespace(gradient_checkpointing_kwargs=None), _metrics={"eval": defaultdict(list)},
            accelerator=SimpleNamespace(device=torch.device("cpu"), gather=as_it_is, gather_for_metrics=as_it_is))
        loss = DPOTrainer._compute_loss(trainer, self.policy, self.inputs(only), False)
        return loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()}

    def cpo(self, loss_type, *, beta=BETA, gamma=0.0, label_smoothing=0.0, mean=False, reference=False):
        """(loss, metrics) of CPOTrainer: DPO's formula without a reference, or on the ratios to one; and SimPO's."""
        import torch
        from trl.experimental.cpo import CPOTrainer

        (chosen, rejected), lengths = self.logps(self.policy)
        if mean:
            chosen, rejected = chosen / lengths[0], rejected / lengths[1]
        logps = chosen.mean().item(), rejected.mean().item()
        if reference:
            ratios = [x.detach() for x in self.logps(self.reference)[0]]
            chosen, rejected = chosen - ratios[0], rejected - ratios[1]
        trainer = SimpleNamespace(alpha=0.0, beta=beta, loss_type=loss_type, simpo_gamma=gamma,
                                  label_smoothing=label_smoothing,
                                  accelerator=SimpleNamespace(device=torch.device("cpu")))
        losses, *rewards = CPOTrainer.cpo_loss(trainer, chosen, rejected)
        return losses.mean(), trl_metrics(*rewards, *logps)

    def orpo(self):
        """(loss, metrics) of ORPOTrainer, but with the log-likelihood of the answer where TRL adds the prompt's."""
        import torch
        from trl.experimental.orpo import ORPOTrainer

        sums, lengths = self.logps(self.policy)
        chosen, rejected = (x / n for x, n in zip(sums, lengths, strict=True))
        trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device=torch.device("cpu")))
        losses, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
        return -chosen.mean() - losses.mean(), trl_metrics(*rewards, chosen.mean().item(), rejected.mean().item())


def trl_metrics(chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """As TRL's experimental trainers log them."""
    return {"rewards/chosen": chosen_rewards.mean().item(), "rewards/rejected": rejected_rewards.mean().item(),
            "rewards/margins": (chosen_rewards - rejected_rewards).mean().item(),
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean().item(),
            "logps/chosen": chosen_logps, "logps/rejected": rejected_logps}


@pytest.fixture(scope="module")
def theirs(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield Theirs(*weights)


@pytest.mark.parity
def test_logps_equal_trl(ours, theirs):
    import torch

    for llama, logps in ((theirs.policy, ours.logps), (theirs.reference, ours.reference_logps)):
        chosen, rejected, weights = ours.pairs(logps)
        found = np.asarray(weights) == 1
        order = np.argsort(ours.pair_ids[found])
        with torch.no_grad():
            expected, lengths = theirs.logps(llama)
        for side, other, length in zip((chosen, rejected), expected, lengths, strict=True):
            np.testing.assert_allclose(np.asarray(side.logps)[found][order], other.numpy(), atol=1e-4)
            np.testing.assert_array_equal(np.asarray(side.lengths)[found][order], length.numpy())
        assert np.std(np.asarray(logps)[np.asarray(logps) != 0]) > 1


CASES = {
    "sigmoid": ({"kind": "sigmoid"}, lambda trl: trl.dpo("sigmoid")),
    "hinge": ({"kind": "hinge"}, lambda trl: trl.dpo("hinge")),
    "ipo_token_mean": ({"kind": "ipo_token_mean"}, lambda trl: trl.dpo("ipo")),
    "sigmoid_norm": ({"kind": "sigmoid_norm"}, lambda trl: trl.dpo("sigmoid_norm")),
    "robust": ({"kind": "robust", "label_smoothing": 0.2}, lambda trl: trl.dpo("robust", label_smoothing=0.2)),
    # TRL's term is a mean over tokens: the same where the chosen answers are of one length, as here.
    "sft": ({"kind": "sigmoid", "sft_weight": 0.5, "only": (1, 3)},
            lambda trl: trl.dpo("sigmoid", "sft", loss_weights=(1.0, 0.5), only=(1, 3))),
    # DPOTrainer takes no notice of label_smoothing with sigmoid, and has neither of the other two.
    "label_smoothing": ({"kind": "sigmoid", "label_smoothing": 0.2},
                        lambda trl: trl.cpo("sigmoid", label_smoothing=0.2, reference=True)),
    "ipo_sum": ({"kind": "ipo_sum"}, lambda trl: trl.cpo("ipo", reference=True)),
    "reference_free": ({"kind": "reference_free"}, lambda trl: trl.cpo("sigmoid")),
    "simpo": ({"kind": "simpo", "beta": 2.0, "gamma": 0.5, "label_smoothing": 0.1},
              lambda trl: trl.cpo("simpo", beta=2.0, gamma=0.5, label_smoothing=0.1, mean=True)),
    "orpo": ({"kind": "orpo"}, lambda trl: trl.orpo()),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16 asks for it
@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_metrics_equal_trl(ours, theirs, name):
    from tests.model.llama import to_llama

    options, theirs_of = CASES[name]
    loss, grad, metrics = ours.evaluate(**({"beta": BETA} | options))
    theirs.policy.zero_grad()
    expected, expected_metrics = theirs_of(theirs)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    grads = to_llama(CONFIG, grad)
    for key, parameter in theirs.policy.named_parameters():
        highest = parameter.grad.abs().max().item()
        assert highest > 1e-4
        np.testing.assert_allclose(grads[key], parameter.grad.numpy(), atol=1e-4 * highest, rtol=0, err_msg=key)
    for key in metrics.keys() - {"pairs"}:
        assert metrics[key] == pytest.approx(expected_metrics[key], rel=1e-4, abs=1e-4), key


def test_packed_equals_unpacked(ours, weights):
    policy, reference = weights
    alone = Ours(UNPACKED, width=27, policy=policy, reference=reference)
    for options in ({"kind": "sigmoid", "sft_weight": 0.5}, {"kind": "orpo"}):
        loss, grad, metrics = ours.evaluate(beta=BETA, **options)
        expected, expected_grad, expected_metrics = alone.evaluate(beta=BETA, **options)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max(), rtol=0), grad,
                     expected_grad)


def test_the_first_step_is_ln_2(weights):
    """The policy in packed rows, the reference's cache from unpacked ones."""
    policy, _ = weights
    packed = Ours(PACKED, width=52, policy=policy, reference=policy)
    alone = Ours(UNPACKED, width=27, policy=policy, reference=policy)
    *sides, found = jax.tree.map(np.asarray, alone.pairs(alone.logps))
    cached = np.zeros((5, 2), np.float32)  # [pair, is chosen]; pair 0 is padding
    for is_chosen, side in ((1, sides[0]), (0, sides[1])):
        cached[alone.pair_ids[found == 1], is_chosen] = side.logps[found == 1]
    packed.reference_logps = cached[packed.pair_ids, packed.is_chosen.astype(int)]
    assert np.sum(packed.reference_logps != 0) == 8
    loss, _, metrics = packed.evaluate(kind="sigmoid", beta=BETA)
    assert loss == pytest.approx(np.log(2), abs=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
