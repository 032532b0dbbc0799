"""Configs: what arrives, from where, and what is said of what is wrong."""

import importlib
import pkgutil

import pytest
from pydantic import model_validator

from ctllm_jax import config
from ctllm_jax.config import load as loading
from ctllm_jax.config.base import Section, key, section
from ctllm_jax.config.dpo import DPOConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.generate import GenerateConfig
from ctllm_jax.config.help import describe_keys
from ctllm_jax.config.load import ConfigError, changeable_paths, find_config, load, read_file, read_values
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.config.types import fill_absent, keys_of

BASE = """
steps: 10
model: {vocab_size: 250, hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, head_dim: 8, ffn_size: 96,
  context_length: 64}
batch: {tokens: 512, sequence_length: 64}
optimizer: {lr: 1e-2}
data: synthetic
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize("text", ["1998", "写一条: 好评 #1", "[你好 ${x}", "a=b", " 空格 ", "no", "null ", "2:1",
                                  "3e-4", "", "- x", "{a: 1}", "'quoted'", "a\nb"])
def test_text_arrives_byte_for_byte(text):
    assert load(GenerateConfig, overrides=[f"prompt={text}"]).prompt == text


def test_text_from_a_file_and_a_literal_at(tmp_path):
    (tmp_path / "prompt.txt").write_text("从前：有 #1\n", encoding="utf-8")
    assert load(GenerateConfig, overrides=[f"prompt=@{tmp_path / 'prompt.txt'}"]).prompt == "从前：有 #1\n"
    assert load(GenerateConfig, overrides=["prompt=@@home"]).prompt == "@home"
    with pytest.raises(ConfigError, match="cannot read nowhere.txt"):
        load(GenerateConfig, overrides=["prompt=@nowhere.txt"])


def test_text_from_standard_input(monkeypatch):
    import io
    import sys
    from types import SimpleNamespace

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("你好\r\n".encode())))
    assert load(GenerateConfig, overrides=["prompt=-"]).prompt == "你好\r\n"


def test_values_are_typed_by_the_schema(base):
    config = load(PretrainConfig, target=base, overrides=[
        "steps=1_000", "optimizer.lr=3e-4", "compute.scan_layers=false", "optimizer.clip_norm=null",
        "sample.prompts=[今天, '1998']", "checkpoint.milestones=0.5,1"])
    assert config.steps == 1000 and config.optimizer.lr == 3e-4 and config.compute.scan_layers is False
    assert config.optimizer.clip_norm is None
    assert config.sample.prompts == ["今天", "1998"] and config.checkpoint.milestones == [0.5, 1.0]


def test_all_errors_at_once_with_value_origin_and_nearest_key(base):
    base.write_text(BASE.replace("lr: 1e-2", "lr: 1e-2, b1: 2.0") + "sead: 1\n")
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, target=base, overrides=["optimizer.lrr=1", "optimizer.lr=fast", "steps=-1"])
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    assert "optimizer.lrr=1 (command line): unknown key; did you mean optimizer.lr?" in problems
    assert "optimizer.lr=fast (command line): needs float" in problems
    assert "steps=-1 (command line): must be >= 1" in problems
    assert "optimizer.b1=2.0" in problems and "base.yaml:6): must be < 1" in problems
    assert "sead" in problems and "base.yaml:8): unknown key; did you mean seed?" in problems


def test_a_misspelled_name_in_the_middle_is_found(base):
    with pytest.raises(ConfigError, match="did you mean data.sources.NAME.weight"):
        load(PretrainConfig, target=base, overrides=["data.sources.zh.path=x", "data.sources.zh.weigth=2"])


def test_shorthands(base):
    synthetic = load(PretrainConfig, target=base)
    assert synthetic.data.kind == "synthetic"
    directory = load(PretrainConfig, target=base,
                     overrides=["data=/some/dir", "data.isolate_documents=false", "run=runs/x"])
    assert directory.data.kind == "mixture" and directory.data.sources["data"].path == "/some/dir"
    assert directory.run.dir == "runs/x" and directory.data.isolate_documents is False


def test_a_path_replaces_the_sources_of_the_file(tmp_path, base):
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\ndata: {kind: mixture, sources: {zh: {path: a}, en: b}}\n")
    assert load(PretrainConfig, target=child).data.sources["en"].path == "b"
    assert list(load(PretrainConfig, target=child, overrides=["data=c"]).data.sources) == ["data"]
    assert list(load(PretrainConfig, target=child, overrides=["data.sources.zh=null"]).data.sources) == ["en"]
    overrides = ["data.sources.en=d", "data.sources.zh.weight=2"]
    renamed = load(PretrainConfig, target=child, overrides=overrides).data.sources
    assert renamed["en"].path == "d" and renamed["zh"].weight == 2


def test_a_mapping_on_the_command_line_may_hold_shorthands(base):
    config = load(PretrainConfig, target=base, overrides=["data.kind=mixture", "data.sources={zh: a, en: {path: b}}"])
    assert {name: source.path for name, source in config.data.sources.items()} == {"zh": "a", "en": "b"}


def test_extends_merges_deeply_and_later_wins(tmp_path, base):
    (tmp_path / "other.yaml").write_text("optimizer: {lr: 5e-3, b2: 0.99}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: [base.yaml, other.yaml]\noptimizer: {b2: 0.9}\nsteps: ${batch.tokens}\n")
    config = load(PretrainConfig, target=child)
    assert (config.optimizer.lr, config.optimizer.b2, config.steps) == (5e-3, 0.9, 512)


def test_a_key_of_a_parent_follows_the_value_that_the_child_gives(tmp_path, base):
    base.write_text(BASE + "evaluation: {every: '${batch.tokens}'}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nbatch: {tokens: 1024}\nlog: {every: '${evaluation.every}'}\n")
    config = load(PretrainConfig, target=child)
    assert config.evaluation.every == config.log.every == 1024


@pytest.mark.parametrize("value", [
    "gs://b/${oc.env:HF_TOKEN}", "${oc.env:HF_TOKEN,none}", "${ oc.env : HF_TOKEN }",
    "a ${oc.decode:${oc.env:HF_TOKEN}}", "${oc.select:seed}",
    "${model.${oc.env:HF_TOKEN}}", "${oc.create:{a: 1}}", r"\\${oc.env:HF_TOKEN}",
    "${.${oc.env:HF_TOKEN}}"])
def test_no_value_is_taken_from_the_environment(base, monkeypatch, value):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    child = base.with_name("child.yaml")
    child.write_text("extends: base.yaml\nrun: {keep: 1}\nsteps: 20\n")
    for place in ("run: {dir: 'VALUE'}", "run: 'VALUE'", "sample: {prompts: ['VALUE']}", "extends: 'VALUE'"):
        base.write_text(BASE + place.replace("VALUE", value) + "\n")
        for target in (base, child):
            with pytest.raises(ValueError, match=r"base.yaml:8\): .*only \$\{KEY\}") as caught:
                load(PretrainConfig, target=target)
            assert "hf_secret" not in str(caught.value)


def test_an_escaped_interpolation_stays_text_also_through_a_child(tmp_path, base, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    base.write_text(BASE + "sample: {prompts: ['\\${oc.env:HF_TOKEN}', '$5 {x}']}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nsteps: 20\n")
    assert load(PretrainConfig, target=child).sample.prompts == ["${oc.env:HF_TOKEN}", "$5 {x}"]


@pytest.mark.parametrize(("place", "named", "value"), [
    ("data: {kind: mixture, sources: {VALUE: a}}", "data.sources", r"a\nb"),
    ("data: {kind: mixture, sources: {zh: {path: VALUE}}}", "data.sources.zh.path", r"a\rb"),
    ("evaluation: {tasks: {names: [a, VALUE]}}", "evaluation.tasks.names", r"\e[2J"),
    *(("run: {dir: VALUE}", "run.dir", value)
      for value in (r"a\nb", r"a\tb", r"\0", r"a\u2028b", r"\u202Etxt", r"\x9b2J"))])
def test_control_characters_in_a_value_are_refused(base, place, named, value):
    base.write_text(BASE.replace("data: synthetic\n", "") + place.replace("VALUE", f'"{value}"') + "\n")
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, target=base, overrides=[] if "data:" in place else ["data=synthetic"])
    [problem] = [problem for problem in caught.value.problems if "control character" in problem]
    assert problem.startswith(f"{named} (") and "base.yaml:" in problem and problem.isprintable()


def test_prose_may_hold_line_ends_and_tabs_but_no_escape(base):
    base.write_text(BASE + 'sample: {prompts: ["a\\tb\\n"]}\n')
    assert load(PretrainConfig, target=base).sample.prompts == ["a\tb\n"]
    for text in ("\x1b[2J", "\0", "\udcff", "\x9b"):
        with pytest.raises(ConfigError, match="only line ends and tabs are allowed here"):
            load(GenerateConfig, overrides=[f"prompt={text}"])


def test_extends_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ValueError, match="extends itself"):
        load(PretrainConfig, target=tmp_path / "a.yaml")


@pytest.mark.parametrize(("text", "message"), [
    ("a: [", "not a readable YAML file"), ("a: " + "[" * 3000 + "]" * 3000, "not a readable YAML file"),
    ("a: " + "9" * 5000, "not a readable YAML file"), ("- 1\n- 2\n", "is a mapping of keys to values"),
    ("a: 1\na: 2\n", "duplicate"), ("a: &a [*a]\n", "aliases .* repeat more than"),
    ("a0: &a0 1\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
     "aliases .* repeat more than 100,000 values"),
    ("steps: ${nowhere}\n", "nowhere"), ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "base.yaml")])
def test_broken_files_are_named(base, text, message):
    base.write_text(text, encoding="latin-1" if not text.isascii() else "utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        load(PretrainConfig, target=base)
    assert "base.yaml" in str(caught.value)


def test_checks_across_keys(base):
    cases = {"batch.tokens=500": "multiple of sequence_length", "model.num_kv_heads=3": "must divide num_heads",
             "model.context_length=32": "above model.context_length", "mesh.fsdp=-1": "at most one of",
             "optimizer.min_lr=1": "above lr", "optimizer.warmup_steps=10": "leaves no step",
             "optimizer.decay_steps=3": "only read with schedule=wsd", "model.head_dim=7": "must be even"}
    for override, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            load(PretrainConfig, target=base, overrides=[override])


def load_pairs(base, *overrides):
    return load(DPOConfig, target=base, overrides=["init=runs/sft", "data=pairs.jsonl", *overrides])


@pytest.mark.parametrize(("length", "overrides"), [(128, []), (256, ["data.pairs_per_row=2"])])
def test_a_row_of_pairs_may_be_longer_than_the_context(base, length, overrides):
    assert load_pairs(base, f"batch.sequence_length={length}", *overrides).batch.sequence_length == length


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.context_length=2048", "batch.sequence_length=8192", "batch.tokens=8192"],
     r"batch.sequence_length=8192 is above 2 answers \* model.context_length=2048, .* data.pairs_per_row, at least 2$"),
    (["data.pairs_per_row=1", "batch.sequence_length=256"],
     r"batch.sequence_length=256 is above 2 answers \* data.pairs_per_row=1 \* model.context_length=64"),
    (["optimizer.warmup_steps=10"], "leaves no step of 10"), (["batch.tokens=300"], "multiple of sequence_length=64")])
def test_a_run_on_pairs_keeps_every_check_of_a_run(base, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_pairs(base, *overrides)


def shadowed_validators(schema):
    """Names of the parents' validators that a schema defines again, so that the parents' own no longer run."""
    return [f"{schema.__name__}.{name}" for parent in schema.__mro__[1:] if hasattr(parent, "__pydantic_decorators__")
            for kind in ("field_validators", "model_validators")
            for name in getattr(parent.__pydantic_decorators__, kind) if name in vars(schema)]


def schemas(parent=Section):
    """Every schema, after all modules that define one have been imported."""
    for child in parent.__subclasses__():
        yield child
        yield from schemas(child)


def test_no_schema_shadows_a_validator_of_its_parent():
    for module in (*(f"config.{found.name}" for found in pkgutil.iter_modules(config.__path__)), "cli.checkpoint"):
        importlib.import_module(f"ctllm_jax.{module}")
    ours = {schema for schema in schemas() if schema.__module__.startswith("ctllm_jax.")}
    assert {DPOConfig, PretrainConfig, GenerateConfig} <= ours
    assert [name for schema in ours for name in shadowed_validators(schema)] == []


def test_a_shadowed_validator_is_found():
    class Parent(Section):
        @model_validator(mode="after")
        def _check(self):
            raise ValueError("never runs in the child")

    class Child(Parent):
        @model_validator(mode="after")
        def _check(self):
            return self

    Child()
    assert shadowed_validators(Child) == ["Child._check"]


def test_a_text_that_yaml_reads_as_a_number_is_refused_with_a_hint(base):
    base.write_text(BASE + "sample: {prompts: [1998]}\n")
    with pytest.raises(ConfigError, match="needs quotes in YAML"):
        load(PretrainConfig, target=base)


def test_unknown_config_names_those_there_are():
    with pytest.raises(ValueError, match="did you mean debug/pretrain"):
        find_config("debug/pretrian")


def test_every_key_says_what_it_means():
    for schema in (PretrainConfig, GenerateConfig):
        for path, info in keys_of(schema):
            assert info.description, path


def test_help_lists_every_key_with_type_range_and_default():
    text = describe_keys(PretrainConfig)
    for path, _ in keys_of(PretrainConfig):
        assert path in text
    assert "optimizer.b1 (float; >= 0, < 1; default 0.9)" in text
    assert "compute.remat (none|ffn|attention|block; default block)" in text


def test_help_shows_an_empty_default_and_whole_bounds():
    text = describe_keys(PretrainConfig)
    assert "run.dir (text; default empty)" in text
    assert "seed (int; >= 0, < 4,294,967,296; default 42)" in text


def test_a_folder_is_refused_as_a_config_and_the_name_of_a_stage_is_completed(tmp_path):
    with pytest.raises(ValueError, match="is a folder, and a config is a YAML file"):
        load(PretrainConfig, target=tmp_path)
    with pytest.raises(ValueError, match="no config quickstart: .*quickstart/pretrain"):
        load(PretrainConfig, target="quickstart")


def test_a_message_about_several_keys_says_where_each_was_set(base):
    with pytest.raises(ConfigError, match=r"config \(command line\): optimizer.warmup_steps=10 leaves no step of 10 .*"
                                          r"lower optimizer.warmup_steps, or raise steps"):
        load(PretrainConfig, target=base, overrides=["optimizer.warmup_steps=10", "steps=10"])


def test_what_a_resumed_run_may_change():
    changeable = changeable_paths(PretrainConfig)
    assert {"steps", "run.dir", "checkpoint.every", "mesh.fsdp", "compute.attention"} <= changeable
    fixed = {"seed", "batch.tokens", "model.hidden_size", "optimizer.lr", "data.mask_eod", "compute.dtype"}
    assert not fixed & changeable


def test_round_trip_through_yaml(tmp_path, base):
    config = load(PretrainConfig, target=base, overrides=["sample.prompts=[今天, 'no', '1998']"])
    again = tmp_path / "again.yaml"
    again.write_text(loading.to_yaml(config), encoding="utf-8")
    assert load(PretrainConfig, target=again) == config


def test_a_config_states_its_format_and_a_newer_one_is_refused_by_name(base):
    assert loading.to_yaml(load(PretrainConfig, target=base)).startswith("config_format: 1\n")
    base.write_text(BASE + "config_format: 2\n")
    with pytest.raises(ValueError, match=r"base.yaml:\d+: config_format=2, this version reads format 1; use"):
        load(PretrainConfig, target=base)


def test_keys_that_an_earlier_version_did_not_know_have_their_older_value_or_default():
    class Rule(Section):
        pattern: str = key(...)
        scale: float = key(2.0, older=1.0)

    class Adapters(Section):
        rank: int = key(8)
        alpha: float = key(16.0)

    class Inner(Section):
        old: int = key(1)
        new: bool = key(True, older=False)

    class Outer(Section):
        required: int = key(...)
        inner: Inner = section(Inner, "")
        whole: Inner = section(Inner, "")
        adapters: Adapters | None = key(None)
        rules: list[Rule] = key([])

    assert fill_absent(Outer, {"inner": {"old": 5}, "adapters": {"rank": 4}, "rules": [{"pattern": "a"}]}) == {
        "inner": {"old": 5, "new": False}, "whole": {"old": 1, "new": False}, "adapters": {"rank": 4, "alpha": 16.0},
        "rules": [{"pattern": "a", "scale": 1.0}]}
    assert fill_absent(Outer, {"inner": {"new": True}, "adapters": None})["adapters"] is None
    assert Outer(required=1).inner.new is True


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True))


def test_what_multiplies_is_refused(tmp_path):
    """Aliases in a run's own config.yaml and on the command line, values of values, and files that extend files."""
    (tmp_path / "config.yaml").write_text(BOMB)
    with pytest.raises(UserError, match=r"config.yaml cannot be read \(its aliases .* repeat more than 100,000 values"):
        read_values(tmp_path / "config.yaml")
    inline = "[" + ", ".join(line.partition(": ")[2] for line in BOMB.splitlines()) + "]"
    with pytest.raises(ConfigError, match="repeat more than"):
        load(PretrainConfig, target="debug/pretrain", overrides=[f"sample.prompts={inline}"])
    keys = "".join(f"k{index}: ${{k{index - 1}}}${{k{index - 1}}}\n" for index in range(1, 40))
    (tmp_path / "keys.yaml").write_text(f"k0: xxxxxxxxxx\n{keys}")
    with pytest.raises(UserError, match=r"keys.yaml: 78 times \$\{KEY\}, and at most 16 are replaced"):
        read_file(tmp_path / "keys.yaml")
    (tmp_path / "0.yaml").write_text("seed: 1\n")
    for index in range(1, 30):
        (tmp_path / f"{index}.yaml").write_text(f"extends: [{index - 1}.yaml, {index - 1}.yaml]\n")
    with pytest.raises(UserError, match="29.yaml: extends more than 63 files"):
        read_file(tmp_path / "29.yaml")
