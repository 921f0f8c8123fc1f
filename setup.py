# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: the README with absolute links, for the project's page on the package index.

In the repository they are relative, and so right in forks, branches and clones; on the index they lead nowhere then.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REPOSITORY = "peft-krona/peft-krona"


def with_absolute_links(text: str, tag: str) -> str:
    """The README of a release: links to its files on GitHub at that tag, and pictures as they are there."""

    def absolute(match: re.Match) -> str:
        picture, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        host = (
            f"https://raw.githubusercontent.com/{REPOSITORY}/{tag}"
            if picture
            else f"https://github.com/{REPOSITORY}/blob/{tag}"
        )
        return f"{picture}[{label}]({host}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, text)


if __name__ == "__main__":
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src/peft_krona/_version.py").read_text(encoding="utf-8"))[1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(long_description=with_absolute_links(readme, f"v{version}"), long_description_content_type="text/markdown")
