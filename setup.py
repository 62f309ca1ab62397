"""The package's description: README.md, with links that lead to the repository from anywhere.

Everything else is in pyproject.toml. There a description can only be a file as it is, and on a
package index the links between the project's own documents would lead nowhere.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# The end of a link or an image that is neither a URL nor a place on the same page.
_RELATIVE = re.compile(r"\]\((?![a-z]+:|#)([^)\s]+)\)")
_IMAGES = (".png", ".svg")


def description() -> str:
    """Return the README for a page that is not in the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Source"]

    def absolute(link: re.Match[str]) -> str:
        # An image has to be served as one, not as a page about it.
        view = "raw" if link[1].endswith(_IMAGES) else "blob"
        return f"]({repository}/{view}/main/{link[1]})"

    return _RELATIVE.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(long_description=description(), long_description_content_type="text/markdown")
