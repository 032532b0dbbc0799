"""The server, asked by lm-eval's client of local completions."""

import pytest

from tests.inference.models import full_logps
from tests.inference.serving import make_small, serving

pytestmark = pytest.mark.parity


def test_lm_eval_reads_our_log_probabilities(tmp_path):
    """Requests of tokens, as lm-eval makes them: sums of log-probabilities, and whether the answer is the likeliest."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")
    pytest.importorskip("tenacity", reason="lm-eval's client needs tenacity (extra: eval)")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import PreTrainedTokenizerFast

    small = make_small(tmp_path)
    # Ids are sent: any tokenizer will do whose ids the model has.
    vocabulary = {"<unk>": 0, "<end>": 2} | {f"w{n}": n for n in range(300) if n not in (0, 2)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", unk_token="<unk>").save_pretrained(tmp_path / "words")
    with serving(small, slots=4) as running:
        client = LocalCompletionsAPI(base_url=f"{running.url}/v1/completions", model="small", max_length=512,
                                     tokenizer_backend="huggingface", tokenizer=str(tmp_path / "words"), batch_size=2)
        context, answer = [5, 90, 17, 33, 250], [40, 41, 8]
        likeliest = full_logps(small.model, context)[-1, :300].argmax()
        asked = [(context, answer), (context, [int(likeliest)]), ([7] * 60, [9])]
        said = client.loglikelihood([
            Instance("loglikelihood", {}, tuple("".join(f" w{n}" for n in ids) for ids in pair), index) for
            index, pair in enumerate(asked)])
    for (before, after), (total, is_greedy) in zip(asked, said, strict=True):
        logps_SV = full_logps(small.model, [*before, *after])
        wanted = [logps_SV[len(before) - 1 + place, token] for place, token in enumerate(after)]
        assert total == pytest.approx(sum(wanted), abs=1e-3)
        assert is_greedy == all(logps_SV[len(before) - 1 + place].argmax() == token for place, token in
                                enumerate(after))
    assert said[1][1] and not said[0][1]
