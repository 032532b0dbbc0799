"""The diffs of docs/extending.md apply to the code as it is, each alone and all together, and do what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DIFFS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```diff\n(.*?)^```$",
                        (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8"), re.M | re.S))

TRIAL = """
import jax, jax.numpy as jnp
from ctllm_jax import cli
from ctllm_jax.config.load import ConfigError, load
from ctllm_jax.config.pretrain import OptimizerConfig
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.config.stages import STAGES
from ctllm_jax.data.chat import Message
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.losses.preference import Answers, preference_loss
from ctllm_jax.model.decoder import Decoder, init_params
from ctllm_jax.training.optimizer import make_optimizer
from data_prep.rules import RULES, SETS
from data_prep.rules.view import View
from data_prep.train_tokenizer import fit

# A loss: pairs as likely as under the reference cost 1 - 1/2 + 1/2.
same = Answers(jnp.full(3, -5.0), jnp.full(3, 4.0), jnp.full(3, -5.0))
assert float(preference_loss(same, same, kind="apo_zero", beta=0.1)[0]) == 3.0

# A filter rule: one exclamation mark among four characters.
assert RULES["exclamation_fraction"].measure(View("好 好 好！")) == 0.25
assert [name for name, chosen in SETS.items() if "exclamation_fraction" in chosen.bounds] == ["web"]

# A chat template: only the answer and its end are learned.
text = ["### Instruction: say hello\\n", "### Response: hello you\\n"] * 20
open("small.model", "wb").write(fit([line.strip() for line in text], vocab_size=300, character_coverage=1.0))
tokenizer = load_tokenizer("small.model")
template = open_template(TemplateConfig(kind="alpaca"), tokenizer)
rendered = template.render([Message("user", "say hello"), Message("assistant", "hello you")])
learned = rendered.ids[rendered.weights > 0].tolist()
assert learned[-1] == tokenizer.eos_id and tokenizer.decode(learned[:-1]).strip() == "hello you"

# A stage: its command is known, and it needs a model.
assert cli.main(["adapt", "--help"]) == 0
adapt = STAGES["adapt"].schema
assert load(adapt, target="configs/debug/pretrain.yaml", overrides=["init=runs/base"]).init == "runs/base"
try:
    load(adapt, target="configs/debug/pretrain.yaml")
except ConfigError as error:
    assert "init" in str(error)
else:
    raise AssertionError("a stage that needs a model started without one")

# A variation of the model, and an optimizer for it.
config = load(STAGES["pretrain"].schema, target="configs/debug/pretrain.yaml", overrides=["model.qk_norm=true"]).model
params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
assert params["blocks"]["query_norm"].shape == (config.num_layers, config.head_dim)
tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
hidden, _ = jax.eval_shape(lambda params, tokens: Decoder(config).apply({"params": params}, tokens), params, tokens)
assert hidden.shape == (1, 8, config.hidden_size)
optimizer = make_optimizer(OptimizerConfig(lr=1e-3, kind="adabelief"), params)
assert "ScaleByBeliefState" in str(jax.eval_shape(optimizer.init, params))
"""


def apply(diff: str, folder: Path, *options: str) -> None:
    """`git apply` in a folder; what git says where it does not apply."""
    done = subprocess.run(["git", "apply", *options], input=diff, cwd=folder, text=True, capture_output=True,
                          env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}, timeout=60)
    assert done.returncode == 0, f"docs/extending.md no longer fits the code: {done.stderr}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the code without any change."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("ctllm_jax", "data_prep", "configs"):
        shutil.copytree(REPOSITORY / name, folder / name)  # with the compiled bytecode: it saves seconds
    return folder


def test_every_section_has_a_diff():
    assert list(DIFFS) == ["A loss", "A filter rule", "A chat template", "A stage", "An optimizer",
                           "A variation of the model"]


@pytest.mark.parametrize("name", DIFFS)
def test_a_diff_applies_to_the_code(copy, name):
    apply(DIFFS[name], copy, "--check")


@pytest.mark.prep
def test_the_extensions_work_together(copy):
    for diff in DIFFS.values():
        apply(diff, copy)
    done = subprocess.run([sys.executable, "-c", TRIAL], cwd=copy, text=True, capture_output=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
