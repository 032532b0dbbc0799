"""Every config that comes with the package loads, and its model has the stated size."""

import re

import pytest

from ctllm_jax.config.dpo import DPOConfig
from ctllm_jax.config.load import config_root, load
from ctllm_jax.config.pairs import PairsConfig
from ctllm_jax.config.prepare import PrepareConfig
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.sft import SFTConfig
from ctllm_jax.model.flops import flops_per_token
from ctllm_jax.model.parameters import count_parameters
from ctllm_jax.training.checkpoints.fingerprint import make_fingerprint

STATED = {"ct_llm_2b/pretrain": 2_134_509_568, "small/150m": 148_264_704, "small/400m": 399_561_728,
          "small/1b": 1_003_554_816, "debug/pretrain": 41_120}
PRETRAIN = [path for path in sorted(config_root().rglob("*.yaml"))
            if not path.stem.startswith(("sft", "dpo")) and path.parent.name not in ("data", "eval")]
TUNING = [path for name in ("sft*.yaml", "dpo*.yaml") for path in sorted(config_root().rglob(name))]


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: str(path.relative_to(config_root()).with_suffix("")))
def test_loads_with_the_stated_count(path):
    config = load(PretrainConfig, target=path)
    name = str(path.relative_to(config_root()).with_suffix(""))
    count = count_parameters(config.model)
    if name in STATED:
        assert count == STATED[name]
    stated = re.search(r"([\d,]{6,}) parameters", path.read_text())
    assert stated, f"{name}: its head does not say how many parameters it has"
    assert int(stated.group(1).replace(",", "")) == count


def test_ct_llm_is_the_papers():
    config = load(PretrainConfig, target="ct_llm_2b/pretrain")
    model, optimizer = config.model, config.optimizer
    assert (model.hidden_size, model.num_layers, model.ffn_size) == (2048, 32, 5504)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (16, 16, 128)
    assert (model.padded_vocab_size, model.tie_embeddings) == (125_824, False)
    assert (model.norm_eps, model.rope_theta) == (1e-5, 10_000)
    assert (optimizer.lr, optimizer.min_lr, optimizer.warmup_steps, optimizer.b1, optimizer.b2, optimizer.eps,
            optimizer.weight_decay, optimizer.clip_norm) == (2e-4, 2e-5, 2000, 0.9, 0.95, 1e-8, 0.1, 1.0)
    assert config.tokens_at(config.steps) == pytest.approx(1254.68e9, rel=1e-4)
    assert not config.data.isolate_documents and config.data.mask_eod and config.seed == 42
    assert len(config.checkpoint.milestones) == 19
    assert sum(source.weight for source in config.data.sources.values()) == pytest.approx(100)
    tied = model.model_copy(update={"tie_embeddings": True})
    assert count_parameters(tied) == 1_876_822_016


@pytest.mark.parametrize("name", ["v5e_256", "v6e_256", "v5p_64", "v5p_256", "h100", "h100_8", "h100_8x8"])
def test_hardware_changes_nothing_of_the_run(name):
    """A run begun on one of them goes on on another."""
    config, plain = (load(PretrainConfig, target=f"ct_llm_2b/{each}") for each in (name, "pretrain"))
    assert make_fingerprint(config, {}) == make_fingerprint(plain, {}) and config.batch == plain.batch.model_copy(
        update={"rows_per_device": config.batch.rows_per_device})


def test_flops_of_ct_llm():
    model = load(PretrainConfig, target="ct_llm_2b/pretrain").model
    flops = flops_per_token(model, sequence_length=4096)
    assert flops.causal / 1e9 == pytest.approx(12.87, abs=0.005) and flops.full / 1e9 == pytest.approx(14.48, abs=0.005)
    windowed = flops_per_token(model.model_copy(update={"sliding_window": 1024}), sequence_length=4096)
    assert windowed.full < flops.full and windowed.causal < windowed.full


@pytest.mark.parametrize("path", TUNING, ids=lambda path: str(path.relative_to(config_root()).with_suffix("")))
def test_a_tuning_config_loads_with_its_command_in_its_head(path):
    command = path.stem.partition("_")[0]
    config = load({"sft": SFTConfig, "dpo": DPOConfig}[command], target=path)
    assert config.init and config.data.sources
    assert f"python launch.py {command} configs/{path.relative_to(config_root())}" in path.read_text()


@pytest.mark.parametrize("path", [path for path in sorted((config_root() / "data").glob("*.yaml"))
                                  if not path.stem.startswith("pairs")], ids=lambda path: path.stem)
def test_a_corpus_config_loads_with_known_rule_sets_and_its_command_in_its_head(path):
    config = load(PrepareConfig, target=path)
    assert config.all_sources() and config.output
    assert f"python launch.py prepare configs/data/{path.name}" in path.read_text()


def test_the_papers_pairs_are_gpt_4s_and_baichuans_and_go_where_dpo_looks():
    path = config_root() / "data" / "pairs_ct_llm.yaml"
    config = load(PairsConfig, target=path)
    assert config.chosen.model == "gpt-4" and "Baichuan" in config.rejected.model and config.rejected.base_url
    assert config.output == load(DPOConfig, target="ct_llm_2b/dpo").data.sources["zh"].path
    assert "python launch.py pairs configs/data/pairs_ct_llm.yaml" in path.read_text()
