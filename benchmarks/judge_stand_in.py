"""A stand-in for a judge, to try `launch.py judge` where no model that can judge is at hand. It judges nothing.

    python benchmarks/judge_stand_in.py 8123
    python launch.py judge runs/chat questions=FILE judge.base_url=http://127.0.0.1:8123/v1 judge.model=stand-in

It counts: how much of an answer is Chinese, how little it repeats itself, how long it is, and how many pairs of
characters it shares with the question (or with the reference, where there is one). It says so in every reply, and what
it gives is no measure of any model.
"""

from __future__ import annotations

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_CHINESE = re.compile("[\u4e00-\u9fff]")
_LONG_ENOUGH = 200  # characters


def bigrams(text: str) -> list[str]:
    """Pairs of neighboring characters, without white space."""
    text = "".join(text.split())
    return [text[place:place + 2] for place in range(len(text) - 1)]


def rate(answer: str, wanted: str) -> tuple[float, str]:
    """A rating from 1 to 10, and the counts that it is made of."""
    pairs = bigrams(answer)
    if not pairs:
        return 1.0, "empty"
    shares = {"中文": len(_CHINESE.findall(answer)) / len("".join(answer.split())),
              "不重复": len(set(pairs)) / len(pairs),
              "长度": min(1.0, len(answer) / _LONG_ENOUGH),
              "相关": min(1.0, 4 * len(set(pairs) & set(bigrams(wanted))) / len(set(bigrams(wanted)) or {""}))}
    return round(1 + 9 * sum(shares.values()) / len(shares), 1), "，".join(f"{name} {share:.0%}" for name, share in
                                                                        shares.items())


def judge(prompt: str) -> str:
    """A reply to a prompt of `evaluation.judge.prompts`."""
    reference = re.search(r"【参考答案】\n(.*?)\n【参考答案结束】", prompt, re.S)
    last = r"〔用户，第二轮〕\n(.*?)\n\n〔助手，第二轮〕\n(.*?)\n"
    if "〔助手，第二轮〕" in prompt:
        found = re.findall(last + r"【[^】]*对话结束】", prompt, re.S)
        question, answers = found[0][0], [answer for _, answer in found]
    elif "【用户的问题】" in prompt:
        question = re.search(r"【用户的问题】\n(.*?)\n【用户的问题结束】", prompt, re.S)[1]
        answers = [answer for _, answer in re.findall(r"【(助手[^】]*回答)】\n(.*?)\n【\1结束】", prompt, re.S)]
    else:
        return "好"
    rated = [rate(answer, reference[1] if reference else question) for answer in answers]
    said = "\n".join(f"计数：{counts}。" for _, counts in rated)
    if len(rated) == 1:
        return f"（替身，不是真正的评审，只做计数）\n{said}\n评分：[[{rated[0][0]:g}]]"
    verdict = "C" if abs(rated[0][0] - rated[1][0]) < 0.5 else "A" if rated[0][0] > rated[1][0] else "B"
    return f"（替身，不是真正的评审，只做计数）\n{said}\n[[{verdict}]]"


class Handler(BaseHTTPRequestHandler):
    """Chat completions."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer the last message."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = {"object": "chat.completion", "model": "stand-in (counts, judges nothing)", "choices": [
            {"index": 0, "finish_reason": "stop",
             "message": {"role": "assistant", "content": judge(body["messages"][-1]["content"])}}]}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
