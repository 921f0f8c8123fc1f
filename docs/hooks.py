# SPDX-License-Identifier: Apache-2.0
"""For mkdocs: links that leave docs/ lead to the repository, as they do when the files are read there."""

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrite relative links to files outside docs/; "docs" is where the repository keeps them."""
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def outside(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target.startswith("docs/"):
            return match[0]
        return f"]({config.repo_url.rstrip('/')}/blob/main/{target}{match[2]})"

    return re.sub(r"\]\((\.\./[^)#]*)((?:#[^)]*)?)\)", outside, markdown)
