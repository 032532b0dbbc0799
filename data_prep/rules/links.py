"""L2: links taken out of the text."""

from __future__ import annotations

import re

_TLDS = ("com|net|org|edu|gov|mil|info|biz|name|xyz|top|vip|club|site|online|shop|wang|mobi|asia|tel|int|app|dev|"
         "cn|hk|tw|mo|jp|kr|sg|us|uk|ca|au|de|fr|ru|eu|es|nl|br|se|ch|io|cc|tv|me|co|la|ws")
"""Common top-level domains, without the English words among them: in, it and at stand behind many a full stop."""

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*+(?<!-))?+"
# A link is ASCII, since Chinese text follows one without a blank; it does not end in a mark of the sentence around it.
_LAST = "[A-Za-z0-9/_~=&#%+-]"
_TAIL = rf"(?::[0-9]{{1,5}}+)?+(?:[/?#](?:[!-~]*{_LAST})?)?"
_RUNS = re.compile("[!-~]{4,}+")
_LINKS = re.compile(rf"""
    (?<![A-Za-z0-9._@-])                              # where a word starts, and not inside a mail address
    (?:
        (?:https?|ftp)://[!-~]*{_LAST}
      | www\.[!-~]*{_LAST}
      | (?:{_LABEL}\.){{3,}}{_LABEL}(?![A-Za-z0-9@-]){_TAIL}         # a.b.c.d: hosts of four parts and more, addresses
      | (?<![\u3400-\u9fff])(?:{_LABEL}\.)+(?-i:{_TLDS})(?![A-Za-z0-9@-]|\.[A-Za-z0-9]){_TAIL}       # name.tld
    )
""", re.VERBOSE | re.IGNORECASE)


def remove_links(text: str) -> tuple[str, int]:
    """The text without links, and how many there were: `http(s)://…`, `www.…`, a.b.c.d hosts, bare `name.tld`.

    A bare name.tld directly after a Chinese character stays: there it is often the end of a sentence and the start of
    the next one. Mail addresses, file names (main.py) and names such as ASP.NET stay too: only common top-level domains
    count, in lower case. Idempotent; linear in the length of the text.
    """
    if "." not in text and "://" not in text:
        return text, 0
    # Whole runs of ASCII first: asking at each character whether a link starts there takes three times as long.
    kept, end = [], 0
    for run in _RUNS.finditer(text):
        if "." in run[0] or "://" in run[0]:
            for link in _LINKS.finditer(text, run.start(), run.end()):
                kept.append(text[end:link.start()])
                end = link.end()
    return "".join([*kept, text[end:]]), len(kept)
