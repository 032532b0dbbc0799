"""Made-up questions in the layouts in which the authors of benchmarks give out theirs; and models that know, or not."""

import csv
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

from lm_eval.api.model import LM

LETTERS = "ABCD"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval"


def subjects_of(benchmark):
    """The subjects that lm-eval knows, from the names of its own files."""
    import lm_eval

    folder, prefix = {"mmlu": ("mmlu/default", "mmlu_"), "cmmlu": ("cmmlu", "cmmlu_"),
                      "ceval": ("ceval", "ceval-valid_")}[benchmark]
    return sorted(path.stem.removeprefix(prefix) for path in
                  (Path(lm_eval.__file__).parent / "tasks" / folder).glob(f"{prefix}*.yaml"))


def as_csv(rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def question(benchmark, subject, split, number):
    """Text, four answers and the letter of the right one; with what makes CSV hard."""
    return [f'{benchmark} {subject}, "{split}"\nno. {number}?', *(f"{letter.lower()}，{number}" for letter in LETTERS),
            LETTERS[(number + len(subject)) % 4]]


def write_mmlu(path, *, questions=2, change=lambda name, rows: rows):
    files = {}
    for subject in subjects_of("mmlu"):
        for split in ("dev", "val", "test"):
            name = f"data/{split}/{subject}_{split}.csv"
            rows = [question("mmlu", subject, split, number) for number in range(5 if split == "dev" else questions)]
            files[name] = as_csv(change(name, rows))
    files["data/auxiliary_train/race.csv"] = as_csv([question("race", "x", "train", 0)])
    write_archive(path, files)


def write_cmmlu(path, *, questions=2, change=lambda name, rows: rows):
    files = {}
    for subject in subjects_of("cmmlu"):
        for split in ("dev", "test"):
            name = f"{split}/{subject}.csv"
            rows = [[number, *question("cmmlu", subject, split, number)]
                    for number in range(5 if split == "dev" else questions)]
            files[name] = as_csv(change(name, [["", "Question", *LETTERS, "Answer"], *rows]))
            files[f"__MACOSX/{split}/._{subject}.csv"] = "\0\1\2"
    write_archive(path, files)


def write_ceval(path, *, questions=2, change=lambda name, rows: rows):
    files = {}
    for subject in subjects_of("ceval"):
        for split in ("dev", "val", "test"):
            name = f"{split}/{subject}_{split}.csv"
            header = ["id", "question", *LETTERS, *(["answer"] if split != "test" else []),
                      *(["explanation"] if split == "dev" else [])]
            rows = [[number, *question("ceval", subject, split, number)[:len(header) - 1],
                     *(["因为"] if split == "dev" else [])] for number in range(5 if split == "dev" else questions)]
            files[name] = as_csv(change(name, [header, *[row[:len(header)] for row in rows]]))
    write_archive(path, files)


def write_archive(path, files):
    """A .zip, or a .tar for a path that ends so."""
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
        return
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def write_jsonl(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_gaokao(folder):
    rows = [{"passage": "材料。" if number else None, "question": f"第{number}题",
             "options": [f"({letter}){letter * 2}" for letter in LETTERS], "label": LETTERS[number], "answer": None,
             "other": {"source": "2021"}} for number in range(3)]
    write_jsonl(folder / "gaokao-history.jsonl", rows)
    write_jsonl(folder / "gaokao-mathqa.jsonl", [{**rows[0], "label": "A C"}, *rows[1:]])
    write_jsonl(folder / "gaokao-mathcloze.jsonl", [{"passage": None, "question": "1+1=", "options": None,
                                                     "label": None, "answer": "2", "other": {}}])


def write_humaneval(path, count=3):
    write_jsonl(path, [{
        "task_id": f"HumanEval/{number}", "prompt": f'def add_{number}(a, b):\n    """Sum."""\n',
        "canonical_solution": "    return a + b\n", "entry_point": f"add_{number}",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"} for number in range(count)])


def write_mbpp(path):
    write_jsonl(path, [{
        "text": f"Write a function that adds {task}.", "code": f"def plus(a):\r\n  return a + {task}", "task_id": task,
        "test_setup_code": "", "test_list": [f"assert plus({a}) == {a + task}" for a in range(3)],
        "challenge_test_list": []} for task in (1, 10, 11, 510, 511, 600, 601, 974)])


def write_cvalues(path, count=4):
    rows = []
    for number in range(count):
        good, bad = f"好答案{number}", f"坏答案{number}"
        label = f"回复{1 + number % 2}"
        first, second = (good, bad) if label == "回复1" else (bad, good)
        rows.append({"meta_info": {"domain_zh": "法理学", "domain_en": "law", "difficulty_level": "easy",
                                   "question": f"问题{number}？", "pos_resp": good, "neg_resp": bad},
                     "prompt": f"问题{number}？\n回复1：{first}\n回复2：{second}\n哪个更好？", "label": label})
    write_jsonl(path, rows)


class Model(LM):
    """Answers from the question's record, by functions of a test; keeps what it was asked."""

    def __init__(self, *, logp=lambda request: 0.0, text=lambda request: ""):
        super().__init__()
        self.logp, self.text, self.asked = logp, text, []

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [(self.logp(request), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [self.text(request) for request in requests]


def right_letter(request):
    """Certain of the letter that the record calls right."""
    row = request.doc
    answer = row.get("answer", row.get("Answer"))
    letter = LETTERS[answer] if isinstance(answer, int) else answer
    return 0.0 if request.args[1].strip() == letter else -10.0
