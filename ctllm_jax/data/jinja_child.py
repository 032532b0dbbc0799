"""The process that renders untrusted templates for `jinja_render`: reads a line of JSON, writes a line.

It has limited memory, cannot write files, and has a CPU time limit for each line. It runs as a script and imports
nothing from this package.
"""

import json
import resource
import signal
import sys

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}`: writes marks around its content if requested."""

    tags = {"generation"}

    def parse(self, parser):
        """Jinja's hook."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller):
        begin, end = self.environment.marks
        return begin + caller() + end


class _OutOfTime(BaseException):
    """An error that no part of a template can catch."""


def _refuse(message):
    raise jinja2.TemplateError(message)


def _environment():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **given: json.dumps(value, **{"ensure_ascii": False, **given})
    environment.globals["raise_exception"] = _refuse
    return environment


def _answer(task, templates, environment, most):
    """Return `{"text": …}`, or `{"error": …}`, with the line if the template is malformed."""
    try:
        if task["source"] is not None:
            templates[task["name"]] = environment.from_string(task["source"])
        if task["values"] is None:
            return {"text": ""}
        environment.marks = task["marks"]
        pieces, size = [], 0
        for piece in templates[task["name"]].generate(**task["values"]):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                return {"error": f"it writes more than {most:,} characters"}
        return {"text": "".join(pieces)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": str(error.message), "line": error.lineno}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it calls itself too often"}
    except Exception as error:
        return {"error": (str(error) or type(error).__name__)[:1000]}


def main(seconds, memory, most):
    """Answer lines until the input ends."""
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))

    def stop(signum, frame):
        raise _OutOfTime

    signal.signal(signal.SIGVTALRM, stop)
    templates, environment = {}, _environment()
    for line in sys.stdin.buffer:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            answer = _answer(json.loads(line), templates, environment, most)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except _OutOfTime:
            answer = {"error": f"it computes for more than {seconds:g} s"}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
