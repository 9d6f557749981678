"""The pages as HTML: ``pip install -e '.[docs]' && sphinx-build -W docs site``."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "switchkit"
version = release = version_of("switchkit")
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
html_theme = "furo"
html_title = f"switchkit {release}"
# Links to headings, as the pages have them.
myst_heading_anchors = 4
