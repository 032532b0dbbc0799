"""Generation through the cache, against a full forward for each token; and what a row's text may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctllm_jax.config.load import load
from ctllm_jax.config.pretrain import PretrainConfig
from ctllm_jax.inference.generate import generate
from ctllm_jax.inference.schedule import SMALLEST
from ctllm_jax.model.decoder import Decoder, head_weights, init_params

PROMPTS = [[5, 9, 3], list(range(1, 41)), [7]]
NEW = 12


@pytest.fixture(scope="module")
def model():
    """The debug model, with weights large enough that its choices are clear and its text has turns."""
    config = load(PretrainConfig, target="debug/pretrain", overrides=["model.init_std=0.3"]).model
    return Decoder(config), init_params(config, jax.random.key(0))


def forward_logits(model, tokens):
    """Logits behind the last token, by a full forward pass without a cache; numpy, padded ids left out."""
    decoder, params = model
    padded = np.zeros((1, 64), np.int32)
    padded[0, :len(tokens)] = tokens
    hidden_BSD, _ = forward(decoder, params, padded, (np.arange(64) < len(tokens)).astype(np.int32)[None])
    logits_V = np.asarray(hidden_BSD)[0, len(tokens) - 1] @ np.asarray(head_weights(params))
    return logits_V[:decoder.config.vocab_size]


forward = jax.jit(lambda decoder, params, tokens, segments: decoder.apply({"params": params}, tokens, segments),
                  static_argnums=0)


def greedy(model, prompts=PROMPTS, **options):
    return generate(*model, prompts, max_tokens=NEW, temperature=0, **options)


@pytest.fixture(scope="module")
def drawn(model):
    return generate(*model, PROMPTS, max_tokens=NEW, temperature=1.0, top_p=1.0, seed=3)


def test_temperature_zero_takes_the_argmax_of_a_full_forward(model):
    """Prompts of 1, 3 and 40 tokens beside each other: padded to one bucket, each from its own place."""
    new = greedy(model)
    for prompt, ours in zip(PROMPTS, new, strict=True):
        tokens, wanted = list(prompt), []
        for _ in range(NEW):
            logits_V = forward_logits(model, tokens)
            first, second = np.sort(logits_V)[[-1, -2]]
            assert first - second > 1e-3, "a tie would decide nothing"
            wanted.append(int(np.argmax(logits_V)))
            tokens.append(wanted[-1])
        assert ours == wanted
    assert len({token for row in new for token in row}) > 10


def test_no_id_that_the_tokenizer_lacks(model):
    """Ids 250 to 255 pad the embedding; made likeliest, they are not drawn."""
    decoder, params = model
    head = params["head"].at[:, 250:].set(params["head"][:, :6] * 100)
    new = generate(decoder, {**params, "head": head}, PROMPTS, max_tokens=NEW, temperature=5.0, top_p=1.0)
    assert all(0 <= token < 250 for row in new for token in row)


def test_the_seed_decides(model, drawn):
    again = generate(*model, PROMPTS, max_tokens=NEW, temperature=1.0, top_p=1.0, seed=3)
    other = generate(*model, PROMPTS, max_tokens=NEW, temperature=1.0, top_p=1.0, seed=4)
    assert again == drawn
    assert all(ours != theirs for ours, theirs in zip(drawn, other, strict=True))


def test_rows_with_one_prompt_differ(model):
    new = generate(*model, [PROMPTS[0]] * 4, max_tokens=NEW, temperature=1.0, top_p=1.0)
    assert len({tuple(row) for row in new}) == 4


def test_neighbors_do_not_change_a_row(model, drawn):
    """The same seed and place in the list; other prompts beside it, shorter ones, of another bucket, or none behind."""
    alone = generate(*model, PROMPTS[:1], max_tokens=NEW, temperature=1.0, top_p=1.0, seed=3)
    among = generate(*model, [PROMPTS[0], [1, 2], list(range(60)), [8] * 5], max_tokens=NEW, temperature=1.0, top_p=1.0,
                     seed=3)
    assert alone[0] == drawn[0] == among[0]
    last = generate(*model, [[2], [3], PROMPTS[2]], max_tokens=NEW, temperature=1.0, top_p=1.0, seed=3)
    assert last[2] == drawn[2]


def test_a_row_stops_at_the_end_of_its_document(model):
    """With one row's fourth token as the id that ends a document, that row stops before it, and the others go on."""
    free = greedy(model)
    stop_id = free[0][3]
    stopped = greedy(model, stop_ids=[stop_id])
    for ours, theirs in zip(stopped, free, strict=True):
        assert ours == (theirs[:theirs.index(stop_id)] if stop_id in theirs else theirs)
    assert len(stopped[0]) <= 3 and max(map(len, stopped)) == NEW


def test_a_document_that_ends_at_once_is_empty(model):
    stop_id = greedy(model, PROMPTS[:1])[0][0]
    assert greedy(model, PROMPTS[:1], stop_ids=[(stop_id + 1) % 250, stop_id]) == [[]]


@pytest.mark.parametrize("length", [SMALLEST - 1, SMALLEST, SMALLEST + 1])
def test_lengths_around_a_bucket(model, length):
    prompt = [(7 * index) % 250 for index in range(length)]
    assert greedy(model, [prompt])[0][0] == int(np.argmax(forward_logits(model, prompt)))


def test_one_token(model):
    assert [len(row) for row in generate(*model, PROMPTS, max_tokens=1, temperature=0)] == [1, 1, 1]


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="needs at least one token"):
        generate(*model, [[1], []], max_tokens=1)


def test_bfloat16_keeps_its_cache_in_bfloat16(model):
    """The cache is as wide as the computation; the text is a plausible one, not the float32 one."""
    decoder, params = model
    new = generate(decoder.clone(dtype=jnp.bfloat16), params, PROMPTS, max_tokens=4, temperature=0)
    logits_V = forward_logits(model, PROMPTS[0])
    assert logits_V[new[0][0]] > np.sort(logits_V)[-10]


def test_row_ids_carry_the_draws_to_any_place(model):
    """A row with its id draws the same elsewhere in another list; another id draws otherwise."""
    options = {"max_tokens": NEW, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    ids = [2**32 - 1, 7, 123_456_789]
    here = generate(*model, PROMPTS, row_ids=ids, **options)
    there = generate(*model, [[1, 2], *PROMPTS[::-1]], row_ids=[5, *ids[::-1]], **options)
    assert there[1:] == here[::-1]
    other = generate(*model, PROMPTS, row_ids=[1, 2, 3], **options)
    assert all(ours != theirs for ours, theirs in zip(here, other, strict=True))
