"""The command line: `launch.py COMMAND [ACTION] [TARGET …] [key=value …]`.

A command is a module of this package with `SCHEMA` (its keys), `USAGE`, and `run(context) -> int`. Nothing but the
standard library is imported before the command is known, and jax only by the command itself.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from ctllm_jax.config.stages import STAGES
from ctllm_jax.config.statuses import DONE, FAILED, INTERRUPTED, REQUEUE, WRONG_INPUT

if TYPE_CHECKING:
    from rich.console import Console

COMMANDS = {
    "quickstart": "from nothing to a Chinese model that writes, in minutes on a laptop",
    "tokenizer": "train a SentencePiece tokenizer on text",
    "prepare": "raw text to a corpus: filtered, deduplicated, tokenized, packed",
    "data": "look at a dataset (inspect), check its sums (verify)",
    **{stage.name: stage.summary for stage in STAGES.values()},
    "pairs": "preference pairs for dpo, from good answers and a weaker model or an endpoint",
    "sweep": "several runs of a stage one after the other, and a comparison of their results",
    "lora": "trained adapters: merge them into their base",
    "import-hf": "a run directory from a Hugging Face model (Llama, Mistral, Qwen2)",
    "export-hf": "a Hugging Face model from a run, or its adapters for PEFT",
    "evaluate": "benchmarks on a model (mmlu, cmmlu, ceval, …), with lm-eval's own tasks",
    "judge": "CHC-Bench, MT-Bench or questions of your own, answered by models and rated by another",
    "tables": "the paper's tables, with the figures of your runs next to its own",
    "generate": "text from a trained model",
    "serve": "an OpenAI-compatible server for a model, with a chat page",
    "chat": "talk to a model that was taught to answer",
    "plan": "the run that a budget of hours or tokens buys",
    "doctor": "problems that would stop a run here: versions, devices, network, data, space; each with its fix",
    "compile": "compile a run's step for hardware that is not here: does it fit, how fast at most",
    "job": "a training run as a job of a cluster (slurm, gke), to read before it is submitted",
    "checkpoint": "a run's checkpoints: list them (ls), check them (verify), compare two (diff), delete some (prune)",
    "kernels": "attention and SwiGLU alone: numerics (check), speed (bench), compiles for chips not here (compile)",
    "report": "one HTML page of one run, or of several compared",
}
_OVERRIDE = re.compile(r"[A-Za-z_][\w\-]*(\.[\w\-]+)*=")


class _Plainly(logging.Formatter):
    """`warning: …`; with its name where a line is another library's."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line, but for a stack."""
        ours = record.name.startswith(("ctllm_jax", "data_prep"))
        from ctllm_jax.config.control import as_started

        return as_started(f"{record.levelname.lower()}{'' if ours else f' ({record.name})'}: {record.message}")


@dataclass
class Context:
    """The context of a command."""

    command: str
    console: Console
    action: str | None = None
    targets: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    dry_run: bool = False
    options: frozenset[str] = frozenset()
    config: Any = None
    began: float = field(default_factory=time.perf_counter)
    """When the command began, by `time.perf_counter`: with its process, or, within another command, now."""

    @property
    def command_line(self) -> str:
        """The command as a user would type it again."""
        import shlex

        words = [self.command, self.action, *self.targets, *self.overrides]
        return "python launch.py " + shlex.join(word for word in words if word)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is one of `ctllm_jax.config.statuses`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has no Chinese is shown escapes
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from ctllm_jax.config.control import as_started

        print(as_started(_overview()))
        return DONE
    command = arguments.pop(0)
    if command == "--version":
        from ctllm_jax import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        return _complain(f"unknown command {command}{_nearest(command, COMMANDS)}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    handler = logging.StreamHandler()
    handler.setFormatter(_Plainly())
    logging.basicConfig(handlers=[handler])
    from ctllm_jax.config.errors import UserError

    try:
        return _run(importlib.import_module(f"ctllm_jax.cli.{command.replace('-', '_')}"), command, arguments)
    except UserError as error:
        return _complain(str(error), status=error.status)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stopped:  # a run that was asked to end
        return stopped.code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            from ctllm_jax.config.extras import explain_missing

            if missing := explain_missing(error):
                return _complain(missing)
        from ctllm_jax.cli.outputs import explain, explain_unexpected
        from ctllm_jax.storage import describe_failure

        failure = describe_failure(error)
        if failure is not None:
            return _complain(f"an object store failed: {failure[0]}", status=WRONG_INPUT if failure[1] else REQUEUE)
        if not isinstance(error, OSError):
            return _complain(explain_unexpected(error), status=FAILED)
        message, status = explain(error)
        return _complain(message, status=status)


def entry() -> NoReturn:
    """The entry point of `launch.py` and the console script: run `main`, then exit."""
    status = main()
    if status == INTERRUPTED and "daft" in sys.modules:
        # Interrupted Daft threads abort the process when the interpreter ends; all our work is done by then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _run(module, command: str, arguments: list[str]) -> int:
    from ctllm_jax.config.errors import UserError

    options = [word for word in arguments if word.startswith("--")]
    overrides = [word for word in arguments if _OVERRIDE.match(word)]
    words = [word for word in arguments if word not in options and word not in overrides]
    known = {"--help", "--print-config", "--dry-run", *getattr(module, "OPTIONS", ())}
    for option in options:
        if option not in known:
            hint = f"; keys are written without dashes: {option[2:]}" if "=" in option else ""
            raise UserError(f"unknown option {option}: there are {', '.join(sorted(known))}{hint}")
    if "--help" in options or "-h" in words:
        from ctllm_jax.config.control import as_started

        print(as_started(_describe(module, command)))
        return 0
    actions = getattr(module, "ACTIONS", {})
    action = None
    if actions:
        if not words or words[0] not in actions:
            given = f"{words[0]} is none: " if words else ""
            raise UserError(f"{command} needs an action; {given}there are {', '.join(actions)}")
        action = words.pop(0)
    from ctllm_jax.cli.object_stores import refuse_everything, refuse_unsupported
    from ctllm_jax.config import load

    if hasattr(module, "configure"):
        # A command whose keys no single schema describes reads its words itself.
        refuse_everything(command, [*words, *overrides])
        config = module.configure(action, words, overrides)
        if "--print-config" in options:
            print(module.to_yaml(config), end="")
            return 0
        return _work(module, _context(command, action, words, overrides, options, config))
    schema = actions[action] if actions else module.SCHEMA
    takes_config = getattr(module, "TAKES_CONFIG", False)
    target = words.pop(0) if takes_config and words else getattr(module, "DEFAULT_CONFIG", None)
    if takes_config and words:
        raise UserError(f"{command} takes one config; {' '.join(words)} is left over (a key is written key=value)")
    if takes_config and target is None and not getattr(module, "CONFIG_IS_OPTIONAL", False):
        raise UserError(f"{command} needs a config, such as {module.EXAMPLE}")
    config = load.load(schema, target=target, overrides=overrides)
    if "--print-config" in options:
        print(load.to_yaml(config), end="")
        return 0
    refuse_unsupported(command, config, words)
    if getattr(module, "TRAINS", False):
        _prepare_compiler(config, target)
    targets = [target] * bool(target) if takes_config else words
    return _work(module, _context(command, action, targets, overrides, options, config))


def _work(module, context: Context) -> int:
    """The command itself, once its outputs are known to be writable."""
    from ctllm_jax.cli.outputs import Output, check_writable, outputs_of
    from ctllm_jax.config.base import Section
    from ctllm_jax.config.pretrain import default_run_dir

    outputs = outputs_of(context.config) if isinstance(context.config, Section) else []
    if getattr(module, "TRAINS", False) and not context.dry_run:
        outputs.append(Output("run.dir", context.config.run.dir or default_run_dir(context.targets[0]), "folder"))
    for output in outputs:
        check_writable(output.path, str(output), kind=output.kind)
    try:
        return module.run(context)
    except OSError as error:
        # After a write to a full disk, for example, the system does not say which file it was.
        if error.filename is None and outputs:
            error.add_note(f"one of {', '.join(map(str, outputs))}")
        raise


def _prepare_compiler(config: Any, target: str) -> None:
    """XLA's flags and the place of compiled programs, for the jax that the command is about to import."""
    from ctllm_jax.cluster import compilation_cache, xla_flags
    from ctllm_jax.config.pretrain import default_run_dir

    xla_flags.set_flags(os.environ, config.compute.xla_flags)
    compilation_cache.set_directory(os.environ, config.compute.compilation_cache,
                                    run_dir=config.run.dir or default_run_dir(target))


def _context(command: str, action: str | None, targets: list[str], overrides: list[str], options: list[str],
             config: Any) -> Context:
    from ctllm_jax.report.terminal import SafeConsole

    console = SafeConsole(soft_wrap=not sys.stdout.isatty(), highlight=False)
    return Context(command, console, action=action, targets=targets, overrides=overrides,
                   dry_run="--dry-run" in options, options=frozenset(options), config=config, began=process_began())


def process_began() -> float:
    """Start time of this process by `time.perf_counter`; now, if the system does not report it."""
    now = time.perf_counter()
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # The twentieth field after the name, which is in parentheses and may contain anything: clock ticks since
            # boot.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return now


def _complain(message: str, *, status: int = WRONG_INPUT) -> int:
    from ctllm_jax.config.control import as_started, visible

    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error:{plain} {visible(as_started(message))}", file=sys.stderr)
    return status


def _nearest(word: str, known) -> str:
    import difflib

    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f": there are {', '.join(known)}"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return (f"{__doc__.splitlines()[0]}\n\ncommands:\n{rows}\n\n"
            "  COMMAND --help          every key of a command: type, default, range, meaning\n"
            "  COMMAND … --print-config  the resolved config\n"
            "    COMMAND … --dry-run       show what would happen: steps, tokens, memory, disk, hours\n\n"
            "start here: python launch.py quickstart")


def _describe(module, command: str) -> str:
    from ctllm_jax.config.help import describe_keys

    parts = [f"{command}: {COMMANDS[command]}\n\n{module.USAGE.strip()}"]
    actions = getattr(module, "ACTIONS", None)
    if actions:
        parts += [f"keys of {command} {action}:\n{describe_keys(schema)}" for action, schema in actions.items()
                  if schema is not None]
    else:
        parts.append(f"keys:\n{describe_keys(module.SCHEMA)}")
    return "\n\n".join(parts)
