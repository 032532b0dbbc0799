"""Blacklists of URLs in the layout of UT1 (University of Toulouse): CATEGORY/domains, …/urls."""

from __future__ import annotations

import functools
import io
import logging
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ctllm_jax.config.errors import UserError, unknown

ALLOWED = frozenset({"liste_blanche", "liste_bu", "exceptions_liste_bu", "catalogue-biu-toulouse", "examen_pix", "good",
                     "child", "cleaning", "update", "verisign", "educational_games", "special", "local", "reaffected"})
"""Categories of UT1 that list what is to be let through: they count only where they are named."""

_SCHEME = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
_HOST_END = re.compile(r"[/?#]")
_WWW = re.compile(r"^www[0-9]*\.")
_CUTS = re.compile(r"[/?#&]")
_LONGEST = 2048
_BLOCK = 2**20
_KINDS = ("domains", "urls")
logger = logging.getLogger(__name__)


class Blacklist:
    """Domains and URL prefixes that are not wanted, as sorted hashes: 8 bytes an entry, whatever its length.

    The hashes are Python's own, which differ from process to process: it is loaded in each, and never pickled.
    """

    def __init__(self, domains: np.ndarray, urls: np.ndarray):
        self._domains, self._urls = _distinct(domains), _distinct(urls)

    @classmethod
    def of(cls, domains: Iterable[str], urls: Iterable[str]) -> Blacklist:
        """The blacklist of some lines of `domains` and `urls` files."""
        return cls(*(_hashes(io.BytesIO("\n".join(lines).encode()), kind)
                     for kind, lines in (("domains", domains), ("urls", urls))))

    def __len__(self) -> int:
        return len(self._domains) + len(self._urls)

    @property
    def bytes(self) -> int:
        """Size of the hashes."""
        return self._domains.nbytes + self._urls.nbytes

    def __reduce__(self):
        raise TypeError("a Blacklist holds hashes of this process; load it in the other one")

    def hit(self, url: str) -> bool:
        """Whether the URL's host is a listed domain or below one, or its start a listed URL.

        Both end at boundaries: `b.com` blocks `a.b.com`, not `ab.com`; `a.com/x` blocks `a.com/x/y` and `a.com/x?q`,
        not `a.com/xyz`. Scheme, user, port, www. and case do not count.
        """
        host, rest = split_url(url)
        if not host:
            return False
        if _holds(self._domains, _parents(host)):
            return True
        bare = _WWW.sub("", host)
        return len(self._urls) > 0 and _holds(self._urls, _prefixes(bare + rest))


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """The sorted, distinct values. np.unique takes five times as long: it builds a hash table."""
    hashes = np.sort(hashes)
    first = np.ones(len(hashes), bool)
    first[1:] = hashes[1:] != hashes[:-1]
    return hashes[first]


def split_url(url: str) -> tuple[str, str]:
    """Host and rest (path, query, fragment) of a URL, in lower case, without scheme, user and port."""
    url = _SCHEME.sub("", url.strip()[:_LONGEST]).lower()
    end = _HOST_END.search(url)
    host, rest = (url[:end.start()], url[end.start():]) if end else (url, "")
    host = host.rpartition("@")[2]
    if not host.startswith("["):
        host = host.partition(":")[0]
    return host.strip("."), rest


def _parents(host: str) -> Iterator[str]:
    """A host and the domains above it: a.b.c, b.c, c; an address has none above."""
    yield host
    if not host.replace(".", "").isdigit():
        while "." in host:
            host = host.partition(".")[2]
            yield host


def _prefixes(url: str) -> Iterator[str]:
    """A URL and its starts that end where a part of it ends."""
    for cut in _CUTS.finditer(url):
        yield url[:cut.start()]
    yield url.rstrip("/")


def _holds(hashes: np.ndarray, candidates: Iterator[str]) -> bool:
    if not len(hashes):
        return False
    wanted = np.fromiter((hash(candidate.encode("utf-8", "replace")) for candidate in candidates), np.int64)
    places = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
    return bool((hashes[places] == wanted).any())


def load(paths: Sequence[str], categories: Sequence[str] = ()) -> Blacklist | None:
    """The blacklist of folders or .tar.gz files in UT1's layout; None without paths.

    One copy a process, whoever asks. `categories` are those that count; none: all but `ALLOWED`. A category that no
    file has is a UserError.
    """
    if not paths:
        return None
    return _load(tuple((path, _changed(path)) for path in paths), tuple(sorted(categories)))


def _changed(path: str) -> float:
    try:
        return Path(path).stat().st_mtime
    except OSError as error:
        raise UserError(f"filter.url_blacklists: {path}: {error.strerror}; a folder or a .tar.gz with "
                        "CATEGORY/domains and CATEGORY/urls is needed") from None


@functools.lru_cache(maxsize=4)
def _load(paths: tuple[tuple[str, float], ...], categories: tuple[str, ...]) -> Blacklist:
    parts: dict[str, list[np.ndarray]] = {"domains": [], "urls": []}
    seen: set[str] = set()
    for path, _ in paths:
        for category, kind, open_list in _lists(Path(path)):
            seen.add(category)
            if category in categories if categories else category not in ALLOWED:
                with open_list() as lines:
                    parts[kind].append(_hashes(lines, kind))
    if not seen:
        raise UserError(f"filter.url_blacklists: {', '.join(path for path, _ in paths)}: no CATEGORY/domains or "
                        "CATEGORY/urls in it")
    for category in categories:
        if category not in seen:
            raise unknown("filter.blacklist_categories:", category, sorted(seen))
    domains, urls = (np.concatenate(found or [np.zeros(0, np.int64)]) for found in parts.values())
    blacklist = Blacklist(domains, urls)
    logger.info("URL blacklist: %d entries", len(blacklist))
    return blacklist


def _hashes(lines: BinaryIO, kind: str) -> np.ndarray:
    """Hashes of the lines of a list, int64; a block at a time, since the largest list has millions of lines."""
    found = [np.zeros(0, np.int64)]
    while block := lines.read(_BLOCK):
        entries = (block + lines.readline()).lower().replace(b"\r", b"").split(b"\n")
        if kind == "urls":
            entries = map(_bare, entries)
        found.append(np.fromiter(map(hash, filter(None, entries)), np.int64))
    return np.concatenate(found)


def _bare(line: bytes) -> bytes:
    if line.startswith(b"www"):
        line = _WWW.sub("", line.decode("utf-8", "replace")).encode()
    return line.strip().rstrip(b"/")


def _lists(path: Path) -> Iterator[tuple[str, str, Callable[[], BinaryIO]]]:
    """Every (category, domains or urls, function that opens it) of a folder or an archive.

    UT1 has old names of categories as links to the folders of new ones: a linked category reads the same file.
    """
    if path.is_dir():
        for file in sorted([*path.glob("*/*"), *path.glob("*/*/*")]):
            if file.name in _KINDS and file.is_file():
                yield file.parent.name, file.name, functools.partial(open, file, "rb")
        return
    try:
        with tarfile.open(path) as archive:
            members = {member.name.removeprefix("./"): member for member in archive.getmembers()}
            links = {name: posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
                     for name, member in members.items() if member.issym()}
            for name, member in members.items():
                category, _, kind = name.rpartition("/")
                if kind in _KINDS and category and member.isfile():
                    for known in (category, *(link for link, target in links.items() if target == category)):
                        yield known.rpartition("/")[2], kind, functools.partial(archive.extractfile, member)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"filter.url_blacklists: {path} is no readable .tar.gz: {error}") from None
