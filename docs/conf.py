"""The documentation site: python -m sphinx -W docs OUTPUT (extra: docs)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ctllm_jax import __version__  # noqa: E402

project, author, release = "ctllm_jax", "The ctllm_jax contributors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
# Links to files outside docs/ do not resolve here, because the pages are also read in the repository;
# tests/test_docs.py checks all links.
suppress_warnings = ["myst.xref_missing", "myst.header"]
html_theme = "furo"
html_title = f"ctllm_jax {release}"
exclude_patterns = ["_build"]
