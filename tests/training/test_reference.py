"""A kept reference is refused as soon as anything that it depends on is another, and what that is is named."""

import json

import jax
import pytest

from ctllm_jax.config.dpo import PairDataConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.preference import PreferenceData
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.model.decoder import init_params
from ctllm_jax.training import reference
from ctllm_jax.training.checkpoints.checkpoint import Kept
from ctllm_jax.training.dpo import make_objective
from ctllm_jax.training.reference import attach_reference
from data_prep.train_tokenizer import fit
from tests.training.test_dpo import ROWS, S, make_config

PAIRS = [("今天", "天气不错", "不错"), ("公园", "我们去散步", "散步"), ("我们", "去公园", "天气")]


@pytest.fixture(scope="module")
def load_data(tmp_path_factory):
    """Changes -> the data: of the pairs, the tokenizer, the template, the length of a row."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = [f"{index}：{''.join(pair)}" for index in range(60) for pair in PAIRS]
    for name, size in (("small", 290), ("other", 289)):
        (folder / f"{name}.model").write_bytes(fit(lines, vocab_size=size, character_coverage=1.0))

    def load_data(*, pairs=PAIRS, tokenizer="small", plain_user="用户：{content}\n", sequence_length=S):
        rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        opened = load_tokenizer(folder / f"{tokenizer}.model")
        template = open_template(TemplateConfig(kind="plain", plain_user=plain_user), opened)
        config = PairDataConfig(**PairDataConfig.from_shorthand(str(folder / "pairs.jsonl")))
        return PreferenceData(config, template=template, tokenizer=opened, sequence_length=sequence_length,
                              context_length=S, rows=ROWS, seed=3, vocab_size=352)

    return load_data


@pytest.fixture(scope="module")
def checkpoint():
    """What stands in for that of `init`: its meta can be replaced."""
    params = init_params(make_config().model, jax.random.key(0))
    known = Kept(7, "resumable", None, {"fingerprint": {"config": {"seed": 1}}})
    found = {"kept": known}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "find_checkpoint", lambda model: (None, found["kept"]))
        patch.setattr(reference, "load_params", lambda kept, abstract: jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), params, abstract))
        yield found
        found["kept"] = known


@pytest.fixture(scope="module")
def kept(load_data, checkpoint, tmp_path_factory):
    """The folder of a reference that has just been computed."""
    folder, data = tmp_path_factory.mktemp("run"), load_data()
    config = make_config(f"data.reference={folder / 'reference.npz'}")
    assert attach_reference(config, data, make_objective(data), directory=folder)["how"] == "computed"
    return folder


@pytest.mark.parametrize(("changes", "named"), [
    ({"step": 8}, {"reference model"}),
    ({"meta": {"fingerprint": {"config": {"seed": 2}}}}, {"reference model"}),
    ({"tokenizer": "other"}, {"tokenizer"}),
    ({"plain_user": "问：{content}\n"}, {"template", "pairs"}),
    ({"sequence_length": S - 32}, {"sequence_length"}),
    ({"pairs": PAIRS[:2]}, {"pairs"}),
    ({"pairs": [PAIRS[0], PAIRS[1], ("我们", "天气", "去公园")]}, {"pairs"}),  # the other answer is preferred
    ({"dtype": "bfloat16"}, {"dtype"}),
], ids=lambda value: "-".join(sorted(value)))
def test_what_makes_a_reference_stale_is_named(load_data, checkpoint, kept, changes, named):
    data = load_data(**{name: changes[name] for name in changes.keys() & {"tokenizer", "plain_user", "pairs",
                                                                          "sequence_length"}})
    before = checkpoint["kept"]
    changed = Kept(changes.get("step", before.step), before.kind, None, changes.get("meta", before.meta))
    config = make_config(f"compute.dtype={changes.get('dtype', 'float32')}",
                         f"data.reference={kept / 'reference.npz'}")
    content = (kept / "reference.npz").read_bytes()
    checkpoint["kept"] = changed
    try:
        with pytest.raises(UserError) as error:
            attach_reference(config, data, make_objective(data), directory=kept)
    finally:
        checkpoint["kept"] = before
    head, *lines, last = str(error.value).splitlines()
    assert head == f"{kept / 'reference.npz'}: the reference log-probabilities are stale:"
    assert last == "remove the file, and they are computed anew, or give another data.reference"
    found = {line.strip().partition(":")[0] for line in lines}
    assert named <= found and (found == named or changes.keys() == {"tokenizer"})
    assert all(" in the file, " in line and line.endswith(" now") for line in lines)
    assert (kept / "reference.npz").read_bytes() == content


def test_every_identity_has_its_file_beside_the_pairs(load_data, checkpoint, tmp_path):
    """Runs of the same share it, whatever their directory; where nothing can be written it lies in that."""
    def attach(run, *overrides, pairs="pairs.jsonl", **changes):
        (tmp_path / pairs).parent.mkdir(exist_ok=True)
        data = load_data(**changes)
        return attach_reference(make_config(f"data.sources.zh.path={tmp_path / pairs}", *overrides), data,
                                make_objective(data), directory=tmp_path / run)

    first, second = attach("a"), attach("b")
    assert (first["how"], second["how"]) == ("computed", "kept") and first["file"] == second["file"]
    other = attach("a", tokenizer="other")
    assert other["how"] == "computed" and other["file"] != first["file"]
    assert attach("b", "compute.dtype=bfloat16")["how"] == "computed" and attach("c")["how"] == "kept"
    assert len(list((tmp_path / "pairs.jsonl.reference").iterdir())) == 3 and not (tmp_path / "a").exists()
    (tmp_path / "full.reference").touch()  # no folder can be made there
    for how in ("computed", "kept"):
        found = attach("d", pairs="full")
        assert found["how"] == how and found["file"].startswith(f"{tmp_path / 'd'}/reference-")
