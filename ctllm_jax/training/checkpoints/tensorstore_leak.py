"""Avoid a memory leak of TensorStore in each save.

TensorStore 0.1.86 never frees the keys and values of a dict that it returns to Python as JSON: it gives up references
to PyDict_SetItem, which does not take them over. Orbax requests such dicts in each save: four times for all of
TensorStore's counters, to log the number of bytes written, and once per array for the spec of the folder, from which it
needs only the given driver and path. A save of the debug model leaked 770 objects, about 55 KB, until the end of the
process. On an object store the specs are still requested.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tensorstore as ts


class _Instead:
    """An object with some of its attributes replaced."""

    def __init__(self, whole: Any, **exchanged: Any):
        self._whole = whole
        vars(self).update(exchanged)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def leave_out() -> None:
    """Make Orbax work without those dicts in this process; an Orbax without these calls is not changed."""
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils as theirs
    except ImportError:
        return
    if getattr(theirs, "ts", None) is ts:
        theirs.ts = _Instead(ts, experimental_collect_matching_metrics=lambda *_, **__: [],
                             KvStore=_Instead(ts.KvStore, Spec=_spec))


def _spec(given: Any) -> Any:
    """As `ts.KvStore.Spec(given)`; for a folder, Orbax uses only its JSON."""
    if isinstance(given, dict) and set(given) == {"driver", "path"} and given["driver"] == "file":
        return SimpleNamespace(to_json=lambda: dict(given))
    return ts.KvStore.Spec(given)
