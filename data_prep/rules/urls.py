"""L1: a document's URL against blacklists."""

from __future__ import annotations

from data_prep.rules.registry import rule
from data_prep.rules.view import View


@rule("url_blacklist", "L1", high=0, cost=1, language="any", domain="any")
def url_blacklist(view: View) -> float:
    """1 if the document's URL is on a blacklist (by domain or by the start of its path), else 0; 0 without a URL."""
    return float(view.blacklist is not None and view.url is not None and view.blacklist.hit(view.url))
