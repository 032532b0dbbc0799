"""What TensorStore would lose of memory in each save, left out.

Its Python side (0.1.86) never frees the keys and values of a dict that it gives out as JSON: it hands PyDict_SetItem
references that it counts as its own, and that function takes none. Orbax asks for such dicts in each save: four times
for all of TensorStore's counters, to log how many bytes were written, and once per array for the spec of the folder, of
which only the driver and the path come back, as they went in. A save of the debug model lost 770 objects, some 55 KB,
for as long as the process lived. On an object store the specs are still asked for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import tensorstore as ts


class _Instead:
    """Something with some of its attributes exchanged."""

    def __init__(self, whole: Any, **exchanged: Any):
        self._whole = whole
        vars(self).update(exchanged)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def leave_out() -> None:
    """Let Orbax work without those dicts, in this process; an Orbax that has none of this stays as it is."""
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils as theirs
    except ImportError:
        return
    if getattr(theirs, "ts", None) is ts:
        theirs.ts = _Instead(ts, experimental_collect_matching_metrics=lambda *_, **__: [],
                             KvStore=_Instead(ts.KvStore, Spec=_spec))


def _spec(given: Any) -> Any:
    """As `ts.KvStore.Spec(given)`, of which Orbax wants nothing but the JSON where it is a folder's."""
    if isinstance(given, dict) and set(given) == {"driver", "path"} and given["driver"] == "file":
        return SimpleNamespace(to_json=lambda: dict(given))
    return ts.KvStore.Spec(given)
