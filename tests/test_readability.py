"""The sample of sentences by which the project's English is judged."""

import runpy
from pathlib import Path

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parent.parent / "benchmarks" / "readability.py"))


def texts(text):
    return [sentence.text for sentence in SCRIPT["sentences"]("page.md", 1, text)]


def test_a_seed_gives_the_same_sentences():
    assert SCRIPT["draw"](3, 20) == SCRIPT["draw"](3, 20) != SCRIPT["draw"](4, 20)


def test_a_drawn_sentence_names_its_file_and_line():
    for sentence in SCRIPT["draw"](0, 30):
        lines = (SCRIPT["REPOSITORY"] / sentence.file).read_text(encoding="utf-8").splitlines()
        assert 1 <= sentence.line <= len(lines)


def test_text_is_split_into_sentences_and_items():
    text = "One sentence has six words here. Another one has six words.\n\n- The item of a list counts.\n- Too short.\n"
    assert texts(text) == ["One sentence has six words here.", "Another one has six words.",
                           "The item of a list counts."]


def test_fields_of_a_message_are_shown_as_braces():
    path = SCRIPT["REPOSITORY"] / "ctllm_jax" / "storage.py"
    assert any("{}" in sentence.text for sentence in SCRIPT["of_module"](path))
