"""Every rule once more, in plain Python and straight from the table: what the fast versions are compared with.

Nothing here is shared with data_prep but the map of U2 and the segmentation of rjieba.
"""

import math
import string
import unicodedata
from collections import Counter
from itertools import groupby

import rjieba

from data_prep.rules.normalize import PUNCTUATION

INVISIBLE = ("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u2800\u3164\uffa0"
             + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])))


def measured(text, published=False):
    """U2(NFKC(text)); unless published without what is invisible, and without separators."""
    text = "".join(PUNCTUATION.get(character, character) for character in unicodedata.normalize("NFKC", text))
    if published:
        return text
    text = "".join(character for character in text if not is_invisible(character))
    lines = []
    for line in text.split("\n"):
        marks = [character for character in line if not character.isspace()]
        if len(marks) >= 3 and all(map(is_separator, marks)):
            line = ""
        lines.append("".join(" " if is_separator(character) and count >= (13 if character in ".…．" else 5)
                             else character * count
                             for character, same in groupby(line) for count in (len(list(same)),)))
    return "\n".join(lines)


def is_invisible(character):
    category = unicodedata.category(character)
    return category in ("Cf", "Co") or category == "Cc" and not character.isspace() or character in INVISIBLE


def is_separator(character):
    category = unicodedata.category(character)
    return character in "*#.·•‧∙・…:/\\※＊＃．" or category in ("So", "Sm", "Sk", "Pd", "Pc") and character != "\ufffd"


def is_space(character):
    return character.isspace() or character in "\u200b\ufeff"


def is_punctuation(character):
    return unicodedata.category(character).startswith("P") or character in string.punctuation


def characters(text, published=False):
    """The words of the table: the characters of the measured text, without white space."""
    return [character for character in measured(text, published) if not is_space(character)]


def runs(flags):
    """How many runs of true values there are."""
    return sum(flag and not (index and flags[index - 1]) for index, flag in enumerate(flags))


def share(part, whole):
    return part / whole if whole else 0.0


def bracket_fraction(text):
    inside = depth = 0
    for character in text:
        if character == "【":
            depth, since = 1, 0
        elif character == "】":
            if depth:
                inside += since
            depth = 0
        elif depth:
            since += 1
    return share(inside, len(text))


def sentences(text):
    pieces = [""]
    for character in measured(text):
        if character in '.!?…;"\n':
            pieces.append("")
        elif not is_space(character):
            pieces[-1] += character
    return float(sum(map(bool, pieces)))


def length(text):
    return float(len(characters(text)))


def word_length(text):
    words = [word for word in rjieba.cut(measured(text)[:SEGMENTED])
             if len(word) > 1 or not (is_punctuation(word) or is_space(word))]
    return share(sum(len(word) for word in words), len(words))


SEGMENTED = 1000


def hash_fraction(text):
    found = characters(text)
    return share(runs([character == "#" for character in found]), len(found))


def ellipsis_fraction(text):
    found, count, index = characters(text), 0, 0
    while index < len(found):
        end = index
        while end < len(found) and found[end] in ".…":
            end += 1
        count += end - index >= 2
        index = max(end, index + 1)
    return share(count, len(found))


def digit_fraction(text):
    others = [character for character in characters(text) if not is_punctuation(character)]
    return share(sum(unicodedata.category(character) == "Nd" for character in others), len(others))


def lines_of(text):
    return [line.strip() for line in text.split("\n") if line.strip()]


def more_line_fraction(text):
    lines = lines_of(measured(text))
    ends = ("readmore", "read more", "展开", "更多", "...")
    return share(sum(any(line.lower().endswith(end) for end in ends) for line in lines), len(lines))


def bullet_line_fraction(text):
    lines = [(line.strip(), seen) for line, seen in zip(text.split("\n"), measured(text).split("\n"), strict=True)
             if seen.strip()]
    return share(sum(line[:1] in tuple("•●○■□▪▫※·➢‣▶◀◦–") and weight(seen) <= 4 for line, seen in lines), len(lines))


def is_chinese(line):
    """Whether a line has a Chinese, Japanese or Korean character."""
    return any(unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL"))
               for character in line)


def weight(line):
    """Letters and digits of a line with Chinese, Japanese or Korean characters, two for each word of another one."""
    if is_chinese(line):
        return sum(character.isalnum() for character in line)
    return 2 * sum(any(character.isalnum() for character in word) for word in line.split())


def punctuation_fraction(text):
    found = characters(text)
    return share(sum(map(is_punctuation, found)) + max(0, len(lines_of(measured(text))) - 1), len(found))


def distinct_fraction(text):
    found = characters(text)
    windows = max(1, math.ceil(len(found) / 1000))
    starts = [number * (len(found) - 1000) // (windows - 1) if windows > 1 else 0 for number in range(windows)]
    return share(sum(len(set(found[start:start + 1000])) for start in starts), windows * min(1000, len(found)))


def entropy(text):
    found = characters(text)
    return -sum(count / len(found) * math.log(count / len(found)) for count in Counter(found).values())


def top_fraction(n, text):
    found = characters(text)
    inside = inside_of(found, n)
    return max((len(positions) - n for positions in inside.values()), default=0) / len(found) if found else 0.0


def inside_of(found, n):
    """For each n-gram the positions that its occurrences cover."""
    inside = {}
    for start in range(len(found) - n + 1):
        inside.setdefault(tuple(found[start:start + n]), set()).update(range(start, start + n))
    return inside


def places_that_repeat(found, n):
    """The positions of the n-grams that stood there before, each with what it covers."""
    before, inside = set(), set()
    for start in range(len(found) - n + 1):
        gram = tuple(found[start:start + n])
        if gram in before:
            inside |= set(range(start, start + n))
        before.add(gram)
    return inside


def repeated_fraction(n, text):
    found = characters(text)
    return share(len(places_that_repeat(found, n)), len(found))


def repeated_fraction_as_published(n, text):
    found = characters(text, published=True)
    grams = [tuple(found[start:start + n]) for start in range(len(found) - n + 1)]
    counts = Counter(grams)
    inside = {start + offset for start, gram in enumerate(grams) if counts[gram] > 1 for offset in range(n)}
    return share(len(inside), len(found))


def sentence_pieces(text):
    pieces = [""]
    for character in measured(text):
        if character in '.!?…;"\n':
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces if piece.strip()]


def duplicate_sentence_fraction(text):
    pieces = sentence_pieces(text)
    return share(sum(piece in pieces[:index] for index, piece in enumerate(pieces)), len(pieces))


def duplicate_sentence_character_fraction(text):
    pieces = sentence_pieces(text)
    again = sum(len(piece) for index, piece in enumerate(pieces) if piece in pieces[:index])
    return share(again, sum(map(len, pieces)))


def words(text):
    return measured(text).split()


def english_words(text):
    return float(len(words(text)))


def english_word_length(text):
    return share(sum(map(len, words(text))), len(words(text)))


def english_symbol_fraction(text):
    found = measured(text)
    return share(max(found.count("#"), found.count("...")), len(words(text)))


def english_alphabetic_fraction(text):
    return share(sum(any(character.isalpha() for character in word) for word in words(text)), len(words(text)))


def english_stop_words(text):
    lowered = [word.lower() for word in words(text)]
    return float(sum(stop in lowered for stop in ("the", "be", "to", "of", "and", "that", "have", "with")))


def english_ellipsis_line_fraction(text):
    lines = lines_of(measured(text))
    return share(sum(line.endswith("...") for line in lines), len(lines))


def duplicate_line_fraction(text):
    lines = lines_of(measured(text))
    return share(sum(line in lines[:index] for index, line in enumerate(lines)), len(lines))


def duplicate_line_character_fraction(text):
    lines = lines_of(measured(text))
    again = sum(len(line) for index, line in enumerate(lines) if line in lines[:index])
    return share(again, sum(map(len, lines)))


def english_top_fraction(n, text):
    found = words(text)
    grams = Counter(tuple(found[start:start + n]) for start in range(len(found) - n + 1))
    if not grams or max(grams.values()) < 2:
        return 0.0
    inside = inside_of(found, n)
    most = max(grams.values())
    covered = [sum(len(found[place]) for place in inside[gram]) for gram, count in grams.items() if count == most]
    return max(covered) / sum(map(len, found))


def english_repeated_fraction(n, text):
    found = words(text)
    return share(sum(len(found[place]) for place in places_that_repeat(found, n)), sum(map(len, found)))


def replacement_fraction(text):
    found = characters(text)
    lost = text.count("\ufffd")
    for start, character in enumerate(text):
        if unicodedata.category(character) == "Co":
            before, after = text[:start], text[start:]
            while before and unicodedata.category(before[-1]) == "Co":
                before = before[:-1]
            while after and unicodedata.category(after[0]) == "Co":
                after = after[1:]
            lost += bool(before and after) and all(side.isalnum() or side == "_" for side in (before[-1], after[0]))
    return min(1.0, lost / len(found)) if found else float(lost > 0)


def question_mark_fraction(text):
    return share(sum(character == "?" for character in measured(text)), len(characters(text)))


def dropped_lines(text, bad_words=()):
    """W1 to W5 as published: the numbers of the lines that go, and why."""
    gone = {}
    for number, line in enumerate(measured(text, published=True).split("\n")):
        line = line.strip()
        last = line.rstrip(")]}>'~*")[-1:]
        if is_chinese(line):
            count = sum(character.isalnum() for character in line)
        else:
            count = sum(any(character.isalnum() for character in word) for word in line.split())
        if not line:
            continue
        if "javascript" in line.lower():
            gone[number] = "javascript"
        elif "lorem ipsum" in line.lower():
            gone[number] = "lorem_ipsum"
        elif line[-1] not in '.!?…;"' and (not last or last not in '.!?…;"'):
            gone[number] = "terminal_punctuation"
        elif count < 3:
            gone[number] = "three_words"
    return gone


RULES = {function.__name__: function for function in (
    bracket_fraction, sentences, length, word_length, hash_fraction, ellipsis_fraction, digit_fraction,
    more_line_fraction, bullet_line_fraction, punctuation_fraction, distinct_fraction, entropy,
    duplicate_sentence_fraction, duplicate_sentence_character_fraction, english_words, english_word_length,
    english_symbol_fraction, english_alphabetic_fraction, english_stop_words, english_ellipsis_line_fraction,
    duplicate_line_fraction, duplicate_line_character_fraction, replacement_fraction, question_mark_fraction)}
for _n in range(2, 11):
    _fraction, _english = (top_fraction, english_top_fraction) if _n < 5 else (repeated_fraction,
                                                                                english_repeated_fraction)
    _kind = "top" if _n < 5 else "repeated"
    RULES[f"{_kind}_{_n}gram_fraction"] = lambda text, n=_n, function=_fraction: function(n, text)
    RULES[f"english_{_kind}_{_n}gram_fraction"] = lambda text, n=_n, function=_english: function(n, text)
