"""`launch.py chat MODEL`: talk to a model that was taught to answer."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ctllm_jax.config.chat import ChatConfig
from ctllm_jax.config.control import holds_surrogate, visible
from ctllm_jax.config.errors import UserError

if TYPE_CHECKING:
    from ctllm_jax.cli import Context

SCHEMA = ChatConfig
USAGE = """
usage: python launch.py chat MODEL [key=value …]

MODEL is a run directory of `sft` (its newest checkpoint), or RUN@STEP. A line is a question; the answer comes as it is
written. /reset forgets the dialogue, /system TEXT sets the system prompt and forgets, /exit or Ctrl-D ends; Ctrl-C ends
an answer. Questions may come from a pipe, a line each:
  python launch.py chat runs/chat temperature=0.5
  echo 你好 | python launch.py chat runs/chat seed=1
"""


def run(context: Context) -> int:
    """Question, answer, until the input ends."""
    if len(context.targets) != 1:
        raise UserError("chat needs one MODEL: a run directory, or RUN@STEP")
    from ctllm_jax.inference.model import load_model, with_template

    model = load_model(context.targets[0], dtype=context.config.dtype)
    if context.config.template is not None:
        model = with_template(model, context.config.template, name=context.targets[0])
    if model.template is None:
        raise UserError(f"{context.targets[0]} was not taught to answer: it has no chat template. `sft` teaches it; "
                        "`generate` writes on from a prompt; template=KIND gives it one that it has not learned")
    Dialogue(model, model.drawn_as(context.config), context.console).run()
    return 0


class Dialogue:
    """The dialogue so far, and its continuation."""

    def __init__(self, model, config: ChatConfig, console):
        self._model, self._config, self._console = model, config, console
        # One slot: earlier turns stay in the cache, and only the new question is computed.
        self._engine = model.engine(slots=1, steps=4)
        self._system = config.system
        self._messages: list = []
        self._answers = 0

    def run(self) -> None:
        """Read lines until there are none."""
        interactive = sys.stdin.isatty()
        if hasattr(sys.stdin, "reconfigure"):
            # A line that is not UTF-8 is skipped; a decoder error would lose the following lines, too.
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        if interactive:
            self._console.print(f"[dim]{self._model.run_dir}, step {self._model.step:,}; /reset, /system TEXT, "
                                "/exit[/]")
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                if interactive:
                    self._console.print()
                return
            if holds_surrogate(line):
                self._console.print("[yellow]warning:[/] this line is not UTF-8, and is left out")
                continue
            if not interactive and line.strip():
                self._console.out(f"> {line}", style="bold", highlight=False)
            if not self.take(line.strip()):
                return

    def take(self, line: str) -> bool:
        """One line: a command or a question. False where the dialogue ends."""
        command, _, rest = line.partition(" ")
        if line in ("/exit", "/quit"):
            return False
        if line == "/reset":
            self._messages = []
            self._console.print("[dim]forgotten[/]")
        elif command == "/system":
            self._system, self._messages = rest.strip() or None, []
            self._console.print("[dim]system prompt set, dialogue forgotten[/]")
        elif command.startswith("/") and command[1:].isalpha():
            self._console.print("[dim]there are /reset, /system TEXT and /exit[/]")
        elif line:
            self._answer(line)
        return True

    def _answer(self, question: str) -> None:
        from ctllm_jax.data.chat import Message
        from ctllm_jax.inference.request import Request

        config, engine = self._config, self._engine
        system = [] if self._system is None else [Message("system", self._system)]
        messages = [*self._messages, Message("user", question)]
        prompt = self._model.template.prompt_ids([*system, *messages])
        room = engine.max_length - len(prompt)
        if room < 1:
            self._console.print("[yellow]warning:[/] the dialogue fills the model's context; /reset begins a new one")
            return
        number = engine.submit(Request(
            prompt=tuple(prompt), max_tokens=min(config.max_tokens, room), seed=config.seed + self._answers,
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p,
            repetition_penalty=config.repetition_penalty, stop=tuple(config.stop),
            stop_ids=self._model.stop_ids))
        said = ""
        try:
            while engine.busy:
                for event in engine.step():
                    said += event.text
                    # Not through the console, which makes spaces of tabs: code may be copied from here.
                    self._console.file.write(visible(event.text) if self._console.is_terminal else event.text)
                    self._console.file.flush()
        except KeyboardInterrupt:
            engine.cancel(number)
            engine.step()
            self._console.out(" …", end="", highlight=False)
        self._console.out("")
        self._answers += 1
        self._messages = [*messages, Message("assistant", said)]
