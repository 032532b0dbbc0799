"""Every preference loss beside TRL's, in one run: values and gradients of four known pairs and of random ones.

    python benchmarks/preference_table.py [--pairs N]

TRL's values come from its trainers' own loss functions, one pair at a time, given the same log-probabilities; the known
pairs are those of tests/losses/test_preference.py. Differences are the largest of any pair, relative to the larger of 1
and TRL's value. The result is printed and written to benchmarks/results/. Needs the extra `parity`; some seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from data_loading import cpu_name

# Set before jax and TRL are imported, which is inside of the functions.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

COLUMNS = ("chosen", "rejected", "reference_chosen", "reference_rejected", "chosen_lengths", "rejected_lengths")
KNOWN = np.float32([[-10, -20, -5, -30], [-12, -18, -9, -25], [-11, -19, -6, -28], [-11.5, -19.5, -7, -27],
                    [4, 8, 2, 10], [5, 6, 3, 9]])
# Ours, and which trainer of TRL computes it with which of its options: DPOTrainer takes no notice of label_smoothing
# with sigmoid, and has no IPO of sums.
LOSSES = {
    "sigmoid": ({"kind": "sigmoid"}, ("DPOTrainer", {"loss_types": ("sigmoid",)})),
    "sigmoid, label_smoothing 0.1": ({"kind": "sigmoid", "label_smoothing": 0.1},
                                     ("CPOTrainer", {"loss_type": "sigmoid", "label_smoothing": 0.1})),
    "sigmoid_norm": ({"kind": "sigmoid_norm"}, ("DPOTrainer", {"loss_types": ("sigmoid_norm",)})),
    "robust, label_smoothing 0.1": ({"kind": "robust", "label_smoothing": 0.1},
                                    ("DPOTrainer", {"loss_types": ("robust",), "label_smoothing": 0.1})),
    "hinge": ({"kind": "hinge"}, ("DPOTrainer", {"loss_types": ("hinge",)})),
    "ipo_sum": ({"kind": "ipo_sum"}, ("CPOTrainer", {"loss_type": "ipo"})),
    "ipo_token_mean": ({"kind": "ipo_token_mean"}, ("DPOTrainer", {"loss_types": ("ipo",)})),
    "reference_free": ({"kind": "reference_free"}, ("CPOTrainer", {"loss_type": "sigmoid"})),
    "simpo, beta 2, gamma 0.5": ({"kind": "simpo", "beta": 2.0, "gamma": 0.5},
                                 ("CPOTrainer", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5})),
    "orpo": ({"kind": "orpo"}, ("ORPOTrainer", {})),
    "sigmoid, sft_weight 1": ({"kind": "sigmoid", "sft_weight": 1.0},
                              ("DPOTrainer", {"loss_types": ("sigmoid", "sft"), "loss_weights": (1.0, 1.0)})),
}
BETA = 0.1


def draw_pairs(count: int) -> np.ndarray:
    """Random pairs [6, count], rows as COLUMNS says: answers of 1 to 60 tokens, some nats from the reference."""
    draws = np.random.default_rng(0)
    lengths = draws.integers(1, 61, (2, count))
    reference = -lengths * draws.uniform(0.5, 4, (2, count))
    policy = np.minimum(reference + draws.normal(0, 8, (2, count)), -0.1 * lengths)
    return np.concatenate([policy, reference, lengths]).astype(np.float32)


def compute_ours(pairs: np.ndarray, *, kind: str, **options: float) -> tuple[np.ndarray, np.ndarray]:
    """(loss of each pair [P], its gradients in both answers' log-probabilities [2, P])."""
    import jax

    from ctllm_jax.losses.preference import KINDS, Answers, preference_loss

    def loss(chosen, rejected, reference_chosen, reference_rejected, chosen_lengths, rejected_lengths):
        if not KINDS[kind].reference:
            reference_chosen = reference_rejected = None
        return preference_loss(Answers(chosen, chosen_lengths, reference_chosen),
                               Answers(rejected, rejected_lengths, reference_rejected),
                               kind=kind, **({"beta": BETA} | options))[0]

    losses, slopes = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)))(*pairs)
    return np.asarray(losses), np.stack(slopes)


def compute_trl(pairs: np.ndarray, *, trainer: str, uses_reference: bool, **options) -> tuple[np.ndarray, np.ndarray]:
    """The same of TRL, by autograd."""
    import torch

    compute: Callable = {"DPOTrainer": call_dpo, "CPOTrainer": call_cpo, "ORPOTrainer": call_orpo}[trainer]
    losses, slopes = [], []
    for pair in torch.tensor(pairs).T:
        logps = pair[:2].clone().requires_grad_()
        reference = pair[2:4] if uses_reference else torch.zeros(2)
        loss = compute(logps, reference, pair[4:], {"beta": BETA} | options)
        loss.backward()
        losses.append(loss.item())
        slopes.append(logps.grad.numpy())
    return np.array(losses), np.stack(slopes, axis=1)


def call_dpo(logps, reference, lengths, options):
    """DPOTrainer's loss of one pair, from a model that gives an answer's log-probability to its first token."""
    import torch
    from trl import DPOTrainer

    mask = (torch.arange(int(lengths.max()) + 1)[None] <= lengths[:, None]).long()
    mask[:, 0] = 0  # the prompt
    first = torch.zeros(mask.shape)[:, 1:]
    first[:, 0] = 1
    zeros = torch.zeros(first.shape)

    def model(**_):
        return SimpleNamespace(log_probs=first * logps[:, None], entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)

    def as_it_is(x):
        return x

    model.training = False
    trainer = SimpleNamespace(**({"label_smoothing": 0.0, "loss_weights": (1.0,)} | options), model=model,
                              ld_alpha=None, precompute_ref_logps=True, use_weighting=False, aux_loss_enabled=False,
                              f_divergence_type="reverse_kl", _metrics={"eval": defaultdict(list)},
                              _total_train_tokens=0, _tp_size=1, accelerator=SimpleNamespace(
                                  device=torch.device("cpu"), gather=as_it_is, gather_for_metrics=as_it_is))
    inputs = {"input_ids": torch.zeros(mask.shape).long(), "attention_mask": mask, "completion_mask": mask,
              "ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:]}
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


def call_cpo(logps, reference, lengths, options):
    """CPOTrainer's loss of one pair: its formulas know no reference, so they are given the ratios to it."""
    import torch
    from trl.experimental.cpo import CPOTrainer

    scores = logps / lengths if options["loss_type"] == "simpo" else logps - reference
    trainer = SimpleNamespace(**({"label_smoothing": 0.0, "alpha": 0.0} | options),
                              accelerator=SimpleNamespace(device=torch.device("cpu")))
    return CPOTrainer.cpo_loss(trainer, scores[:1], scores[1:])[0].mean()


def call_orpo(logps, reference, lengths, options):
    """ORPOTrainer's odds ratio, and the answer's mean log-likelihood, where TRL takes the prompt's too."""
    import torch
    from trl.experimental.orpo import ORPOTrainer

    means = logps / lengths
    trainer = SimpleNamespace(**options, accelerator=SimpleNamespace(device=torch.device("cpu")))
    return -means[0] - ORPOTrainer.odds_ratio_loss(trainer, means[:1], means[1:])[0].mean()


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the larger of 1 and TRL's value."""
    return float(np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))))


def main() -> None:
    """Compute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=200, help="random pairs, besides the known four")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "preference_losses.json")
    arguments = parser.parse_args()
    from ctllm_jax.losses.preference import KINDS

    drawn = draw_pairs(arguments.pairs)
    rows = []
    print(f"{'loss':30} {'ours':>10} {'TRL':>10} {'apart':>9} {'gradient':>9} {'random':>9} {'gradient':>9}  TRL's")
    for name, (options, (trainer, trl_options)) in LOSSES.items():
        how = {"trainer": trainer, "uses_reference": KINDS[options["kind"]].reference, **trl_options}
        ours, theirs = compute_ours(KNOWN, **options), compute_trl(KNOWN, **how)
        random = [apart(mine, other) for mine, other in
                  zip(compute_ours(drawn, **options), compute_trl(drawn, **how), strict=True)]
        row = {"loss": name, "options": {"beta": BETA} | options, "trl": {"trainer": trainer, **trl_options},
               "ours": float(ours[0].mean()), "theirs": float(theirs[0].mean()), "per_pair": ours[0].tolist(),
               "loss_apart": apart(ours[0], theirs[0]), "gradient_apart": apart(ours[1], theirs[1]),
               "random_loss_apart": random[0], "random_gradient_apart": random[1]}
        rows.append(row)
        print(f"{name:30} {row['ours']:10.6f} {row['theirs']:10.6f} {row['loss_apart']:9.1e}"
              f" {row['gradient_apart']:9.1e} {random[0]:9.1e} {random[1]:9.1e}  {trainer}")
    shown = {"ours": "ours", "theirs": "trl", "loss_apart": "apart", "gradient_apart": "gradients apart",
             "random_loss_apart": "apart, random pairs", "random_gradient_apart": "gradients apart, random pairs"}
    columns = {name: {row["loss"]: row[key] for row in rows} for key, name in shown.items()}
    result = {"sections": {"mean over four known pairs, and random ones": columns},
              "figures": {"known_pairs": KNOWN.shape[1], "random_pairs": arguments.pairs},
              "device": cpu_name(), "flags": {"dtype": "float32"}, "python": platform.python_version(),
              "versions": {package: importlib.metadata.version(package) for package in
                           ("jax", "jaxlib", "torch", "transformers", "trl")},
              "command": shlex.join(["python", "benchmarks/preference_table.py", *sys.argv[1:]])}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    worst = max(max(value for key, value in row.items() if key.endswith("_apart")) for row in rows)
    if worst > 1e-5:
        raise RuntimeError(f"ours and TRL's are {worst:.1e} apart")


if __name__ == "__main__":
    main()
