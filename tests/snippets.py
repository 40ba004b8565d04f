# SPDX-License-Identifier: Apache-2.0
"""What the documentation asks its readers to run: the code blocks of a Markdown page."""

import re
import shlex
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# The comment, which a page shows to nobody, stands above blocks that need what a test does not have.
BLOCK = re.compile(
    r"^(?P<skip><!-- no-test -->\n\s*)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


def blocks(page, language):
    """(first line's number, code) of every block of a language, but for those marked with `<!-- no-test -->`."""
    text = Path(page).read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start("code")) + 1, found["code"])
        for found in BLOCK.finditer(text)
        if found["language"] == language and not found["skip"]
    ]


def commands(page):
    """The shell commands of a page, each as a list of words."""
    lines = "".join(code for _, code in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
