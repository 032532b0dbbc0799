"""Bits per byte, against a sum of -log2 p over the held-out text, token after token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax import sharding
from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.data.batch import Batch
from ctllm_jax.data.pretrain import open_held_out_data
from ctllm_jax.data.tokenizer import load_tokenizer
from ctllm_jax.dataset.reader import Dataset
from ctllm_jax.evaluation.bits_per_byte import evaluate_sources, make_evaluation_step, text_figures
from ctllm_jax.model.decoder import Decoder, head_weights, init_params
from ctllm_jax.training.objective import make_loss_fn
from ctllm_jax.training.run import make_decoder, place_batch
from tests.small_text import VOCABULARY, make_corpus

LENGTH = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_config(corpus, *, isolate, mask):
    return load(PretrainConfig, target="debug/pretrain", overrides=[
        f"model.vocab_size={VOCABULARY}", "model.init_std=0.3", f"batch.sequence_length={LENGTH}", "data.kind=mixture",
        f"data.sources.zh={corpus.folder / 'zh'}", f"data.sources.en={corpus.folder / 'en'}",
        f"data.isolate_documents={isolate}", f"data.mask_eod={mask}"])


def held_out(config, *, rows, max_tokens=10**9):
    return open_held_out_data(config.data, split="validation", sequence_length=LENGTH, rows=rows, max_tokens=max_tokens,
                              vocab_size=VOCABULARY)


def evaluate(config, params, sources, *, corpus, mesh=None, rows=None):
    token_bytes = load_tokenizer(corpus.tokenizer).token_bytes()
    loss_fn = make_loss_fn(config, make_decoder(config, mesh), mesh=mesh, token_bytes=token_bytes, z_loss=0.0,
                           padded=config.data.isolate_documents)
    step = make_evaluation_step(loss_fn, out_sharding=None if mesh is None else sharding.replicated(mesh))
    place = (lambda batch: batch) if mesh is None else partial(
        place_batch, sharding=sharding.batch_sharding(mesh), rows=rows)
    return evaluate_sources(step, params, sources, place=place)


def naive(corpus, source, config, params, *, isolate, mask):
    """(nats, tokens, bytes) of the held-out stream of a source: a forward pass for each stretch of context alone."""
    split = Dataset(corpus.folder / source).split("validation")
    tokenizer = load_tokenizer(corpus.tokenizer)
    eod_id, nats, tokens, size = tokenizer.eos_id, 0.0, 0, 0
    forward = jax.jit(partial(Decoder(config.model).apply, {"params": params}))
    for reader in split.shards:
        stream = reader.window(0, reader.shard.tokens).tokens.astype(int)
        for start in range(0, len(stream), LENGTH):
            row = stream[start:start + LENGTH]
            stretches, first = [], 0
            for place, token in enumerate(row):
                if isolate and token == eod_id or place == len(row) - 1:
                    stretches.append((first, place + 1))
                    first = place + 1
            for first, last in stretches:
                padded = np.zeros((1, LENGTH), np.int32)
                padded[0, :last - first] = row[first:last]
                hidden_SD = np.asarray(forward(padded)[0], np.float64)[0, :last - first]
                logits_SV = (hidden_SD @ np.asarray(head_weights(params), np.float64))[:, :VOCABULARY]
                logps_SV = logits_SV - np.log(np.exp(logits_SV).sum(axis=1, keepdims=True))
                for place in range(first, last):
                    if start + place + 1 == len(stream) or mask and row[place] == eod_id:
                        continue
                    target = stream[start + place + 1]
                    nats -= logps_SV[place - first, target]
                    tokens += 1
                    size += len(piece_bytes(tokenizer, target))
    return nats, tokens, size


def piece_bytes(tokenizer, token):
    """The bytes of one token: its own if it is a byte, else its text's; an end of document has none."""
    from sentencepiece import SentencePieceProcessor

    piece = SentencePieceProcessor(model_file=str(tokenizer.path)).id_to_piece(int(token))
    if token == tokenizer.eos_id:
        return b""
    return bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()


@pytest.fixture(scope="module")
def params(corpus):
    return init_params(make_config(corpus, isolate=False, mask=False).model, jax.random.key(0))


@pytest.mark.parametrize(("isolate", "mask"), [(False, False), (True, True), (True, False)])
def test_equal_to_the_naive_sum(corpus, params, isolate, mask):
    """A batch of five rows, the last of which is padded with rows that must not count."""
    config = make_config(corpus, isolate=isolate, mask=mask)
    sources = held_out(config, rows=5)
    ours = evaluate(config, params, sources, corpus=corpus)
    assert list(ours) == ["zh", "en"]
    for source, figures in ours.items():
        nats, tokens, size = naive(corpus, source, config, params, isolate=isolate, mask=mask)
        assert (figures["tokens"], figures["bytes"]) == (tokens, size)
        assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert figures["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
    assert any(not batch.segment_ids.all() for batches in sources.values() for batch in batches)


def test_bytes_are_those_of_the_text(corpus, params):
    """Without masks every byte of the held-out documents is paid for, but those of the very first token."""
    config = make_config(corpus, isolate=False, mask=False)
    tokenizer = load_tokenizer(corpus.tokenizer)
    ours = evaluate(config, params, held_out(config, rows=4), corpus=corpus)
    for source, figures in ours.items():
        reader = Dataset(corpus.folder / source).split("validation").shards[0]
        ids = reader.window(0, reader.shard.tokens).tokens.tolist()
        assert figures["bytes"] == reader.shard.text_bytes - len(piece_bytes(tokenizer, ids[0]))
        assert figures["tokens"] == len(ids) - 1


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_padding_rows_do_not_count(corpus, params, rows):
    config = make_config(corpus, isolate=True, mask=True)
    wanted = evaluate(config, params, held_out(config, rows=5), corpus=corpus)
    ours = evaluate(config, params, held_out(config, rows=rows), corpus=corpus)
    for source in wanted:
        assert ours[source] == pytest.approx(wanted[source], rel=1e-6)


def test_a_mesh_gives_the_same(corpus, params):
    config = make_config(corpus, isolate=True, mask=True)
    wanted = evaluate(config, params, held_out(config, rows=5), corpus=corpus)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    ours = evaluate(config, params, held_out(config, rows=8), corpus=corpus, mesh=mesh, rows=8)
    for source in wanted:
        assert ours[source] == pytest.approx(wanted[source], rel=1e-5)


def test_sources_can_be_read_again_and_cut_short(corpus, params):
    config = make_config(corpus, isolate=True, mask=True)
    sources = held_out(config, rows=2, max_tokens=3 * LENGTH)
    first = evaluate(config, params, sources, corpus=corpus)
    assert evaluate(config, params, sources, corpus=corpus) == first
    assert all(2 * LENGTH < figures["tokens"] <= 3 * LENGTH for figures in first.values())


def test_a_source_without_text_has_no_bits():
    """And one without a token that counts is left out, instead of a division by nothing."""
    def step(params, batch):
        return {"loss": jnp.float32(6), "weight": jnp.sum(batch.loss_weights), "bytes": jnp.float32(0)}

    def batch(weight):
        return Batch(None, None, np.full((1, 3), weight, np.float32), None, None)

    sources = {"ids": [batch(1)], "masked": [batch(0)], "empty": []}
    results = evaluate_sources(step, None, sources, place=lambda batch: batch)
    assert results == {"ids": {"loss": 2.0, "tokens": 3.0}}


def test_a_million_batches_lose_no_digits():
    """Sums on the host: float32 would stop growing at 16.8 million tokens."""
    def step(params, batch):
        return {"loss": np.float32(1), "weight": np.float32(2**24), "bytes": np.float32(3)}

    results = evaluate_sources(step, None, {"big": [None] * 1001}, place=lambda batch: batch)
    assert results["big"]["tokens"] == 1001 * 2**24 and results["big"]["bytes"] == 3003


def test_a_sum_that_text_does_not_have_is_shown_too():
    sums = {"loss": 8.0, "weight": 4.0, "bytes": 0.0, "z_loss": 1.0, "router": 6.0}
    assert text_figures(sums) == {"loss": 2.0, "tokens": 4.0, "loss/router": 1.5}
