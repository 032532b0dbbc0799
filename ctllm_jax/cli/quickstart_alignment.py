"""The quickstart behind pretraining: reviews on demand (SFT), positive ones preferred (DPO), and the verdict on both.

Each training stage is the command of its name with the quickstart's config; where it starts, what it reads and where
it runs follow the pretraining run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctllm_jax.cli.stages import Stages, write_json
from ctllm_jax.config.dpo import DPOConfig
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.sft import SFTConfig
from ctllm_jax.report.page import write_report
from ctllm_jax.report.run import read_run

if TYPE_CHECKING:
    from data_prep.quickstart_reviews import Written

SFT_CONFIG, DPO_CONFIG = "quickstart/sft", "quickstart/dpo"
SAMPLES = 300
"""Answers of each model, the instructions in turns: a share's 95 % interval is at most 11 points wide."""
SAMPLING = {"max_tokens": 100, "temperature": 0.8, "top_p": 0.9}
RESULT = "sentiment.json"


class Aligned(NamedTuple):
    """The run directories of both stages, and the verdict as `sentiment.json` has it."""

    tuned: Path
    preferred: Path
    verdict: dict[str, Any]


def align(base: Path, root: Path, stages: Stages, console: Any, *, seed: int, held_out: float,
          name: Path | None = None) -> Aligned:
    """SFT, DPO and the verdict, from the pretraining run in `base`.

    Args:
      root: the quickstart's data.
      seed: of the order of dialogues and pairs, and of the answers that are judged.
      held_out: share of the documents that no stage trains on.
      name: what the run directories begin with; None: `base`.
    """
    files = make_reviews(root, stages, console, held_out=held_out)
    tuned, preferred = (Path(f"{name or base}-{stage}") for stage in ("sft", "dpo"))
    train_stages(base, tuned, preferred, files, stages, console, seed=seed)
    result = preferred / RESULT
    stages.run("judging", result, lambda path: write_json(path, judge(tuned, preferred, files, seed=seed)),
               stale=lambda path: json.loads(path.read_text())["made_of"] != made_of(tuned, preferred, seed),
               directory=preferred)
    verdict = json.loads(result.read_text())
    write_report([preferred], preferred / "report.html")
    return Aligned(tuned, preferred, verdict)


def make_reviews(root: Path, stages: Stages, console: Any, *, held_out: float) -> Written:
    """The dialogues and pairs, and a line that tells how many."""
    from data_prep.quickstart_reviews import write_reviews, written_in

    folder = root / "reviews"

    def make(path: Path) -> None:
        write_json(path, write_reviews(root / "text" / "zh.jsonl", root / "clean" / "zh", folder, fraction=held_out))

    counts = json.loads(stages.run("reviews", folder / "counts.json", make).read_text())
    console.print(f"reviews: {counts['dialogues']:,} for SFT, half of them positive; {counts['pairs']:,} pairs for"
                  " DPO, positive over negative, of one topic and as many characters; held out:"
                  f" {counts['held_out_reviews']:,} reviews, {counts['held_out_pairs']:,} pairs")
    return written_in(folder)


def train_stages(base: Path, tuned: Path, preferred: Path, files: Written, stages: Stages, console: Any, *,
                 seed: int) -> None:
    """`sft` and `dpo`: each is begun, goes on, or is passed over where its run is done."""
    from ctllm_jax.cli import Context, dpo, sft

    for name, command, schema, target, run, init, data in (
            ("sft", sft, SFTConfig, SFT_CONFIG, tuned, base, files.dialogues),
            ("dpo", dpo, DPOConfig, DPO_CONFIG, preferred, tuned, files.pairs)):
        config = stage_config(schema, target, run=run, init=init, data=data, seed=seed)
        if run.exists() and read_run(run).state == "done":
            console.print(f"[dim]{name}: there already ({run})[/]")
            continue
        began = time.monotonic()
        command.run(Context(name, console, targets=[target], config=config))
        stages.done(name, time.monotonic() - began, directory=run)


def stage_config(schema: type, target: str, *, run: Path, init: Path, data: Path, seed: int) -> Any:
    """The config of a stage that starts from the newest checkpoint of `init`.

    Raises:
      UserError: the run directory holds a run that began from another checkpoint of it.
    """
    from ctllm_jax.config.load import load, read_values
    from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint

    step = find_checkpoint(str(init))[1].step
    begun = run / "config.yaml"
    before = str(read_values(begun).get("init")) if begun.exists() else ""
    if "@" in before and before.rpartition("@")[2] != str(step):
        raise UserError(f"{run} began from {before}, and {init} has gone on to step {step:,} since: remove {run}, and"
                        " the same command makes it anew")
    return load(schema, target=target, overrides=[f"run.dir={run}", f"init={init}@{step}", f"seed={seed}",
                                                  f"data.sources.zh.path={data}"])


def made_of(tuned: Path, preferred: Path, seed: int) -> dict[str, Any]:
    """What a verdict depends on, as JSON."""
    from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint

    models = {name: f"{run}@{find_checkpoint(str(run))[1].step}" for name, run in
              (("sft", tuned), ("dpo", preferred))}
    return {"models": models, "seed": seed, "samples": SAMPLES, **SAMPLING}


def judge(tuned: Path, preferred: Path, files: Written, *, seed: int) -> dict[str, Any]:
    """The verdict on both models: what snownlp says of their answers to the same prompts with the same seeds."""
    from ctllm_jax.evaluation import sentiment
    from ctllm_jax.inference.model import load_model
    from data_prep.held_out import read_records
    from data_prep.quickstart_reviews import INSTRUCTIONS

    judged = sentiment.open_judge()
    instructions = [each for of_topic in INSTRUCTIONS.values() for each in of_topic]
    prompts = [instructions[place % len(instructions)] for place in range(SAMPLES)]
    known = {record["messages"][-1]["content"] for record in read_records(files.dialogues)}
    models = {"sft": load_model(str(tuned)), "dpo": load_model(str(preferred))}
    figures, said = {}, {}
    for name, model in models.items():
        answers = sentiment.write_answers(model, prompts, seed=seed, **SAMPLING)
        positive = [judged.is_positive(answer.text) for answer in answers]
        figures[name] = sentiment.describe_answers(answers, positive, known=known)
        said[name] = [{"text": answer.text, "positive": verdict} for answer, verdict in
                      zip(answers, positive, strict=True)]
    pairs = [(record["prompt"], record["chosen"], record["rejected"]) for record in read_records(files.held_out_pairs)]
    reviews = [(record["text"], record["positive"]) for record in read_records(files.held_out_reviews)]
    return {"made_of": made_of(tuned, preferred, seed), "judge": judged.name, "figures": figures,
            "held_out_pairs": sentiment.reward_accuracy(models["dpo"], models["sft"], pairs),
            "calibration": sentiment.calibrate(judged, reviews),
            "samples": [{"prompt": prompt, **{name: said[name][place] for name in said}}
                        for place, prompt in enumerate(prompts)]}
