"""Comments and docstrings: each sentence names its subject, so that it can be read alone."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).parents[2]

# A sentence that begins with one of these words has no noun for its subject.
FORBIDDEN: Final = re.compile(r"(?:Who|Whose|Whom|Whoever|What|Whatever|Those|Of)\b")

# A sentence ends at one of these marks when a capital letter or a name in backticks follows.
_BETWEEN_SENTENCES: Final = re.compile(r"(?<=[.:;?!])\s+(?=[A-Z`])")
# Comments for tools, which are no sentences.
_FOR_TOOLS: Final = ("noqa", "type:", "fmt:", "pragma:")


class Text(NamedTuple):
    """One docstring, or the comments of consecutive lines."""

    line: int
    words: str

    def sentences(self) -> list[str]:
        """Return the sentences, each on one line; a heading such as "Args:" ends one."""
        return _BETWEEN_SENTENCES.split(re.sub(r"\s+", " ", self.words).strip())


def docstrings(source: str) -> Iterator[Text]:
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        words = ast.get_docstring(node)
        if words is not None:
            yield Text(node.body[0].lineno, words)


def comments(source: str) -> Iterator[Text]:
    """Yield the comments of a module; lines that follow each other are one text."""
    last_line = 0
    text: Text | None = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        words = token.string.lstrip("#").strip()
        if words.startswith(_FOR_TOOLS):
            continue
        line = token.start[0]
        if text is not None and line == last_line + 1:
            text = Text(text.line, f"{text.words} {words}")
        else:
            if text is not None:
                yield text
            text = Text(line, words)
        last_line = line
    if text is not None:
        yield text


def sentences_without_subject(source: str) -> list[str]:
    """Return the sentences that begin with a forbidden word, each with its text's line."""
    return [
        f"{text.line}: {sentence}"
        for text in (*docstrings(source), *comments(source))
        for sentence in text.sentences()
        if FORBIDDEN.match(sentence)
    ]


def all_modules() -> list[str]:
    """Return the paths of all modules of clevrd."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "clevrd").rglob("*.py"))


@pytest.mark.parametrize("path", all_modules())
def test_every_sentence_names_its_subject(path: str) -> None:
    """No sentence of a comment or a docstring begins with Who, What, Those and the like."""
    source = (ROOT / path).read_text()

    assert sentences_without_subject(source) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""What is set here."""\n', ["1: What is set here."]),
        ('def f():\n    """Return it.\n\n    Whoever asks.\n    """\n', ["2: Whoever asks."]),
        (
            'class A:\n    """One. Those that wait\n    are two."""\n',
            ["2: Those that wait are two."],
        ),
        ("# The first line, and\n# another. Of these, one.\n", ["1: Of these, one."]),
        ("a = 1  # Who reads.\n", ["1: Who reads."]),
        ("# How long: Whatever is left.\n", ["1: Whatever is left."]),
    ],
    ids=["docstring", "its last line", "middle of a text", "comments", "behind code", "colon"],
)
def test_sentences_without_a_subject_are_found(source: str, found: list[str]) -> None:
    """A sentence is found in a docstring, in lines of comments, and in the middle of a text."""
    assert sentences_without_subject(source) == found


@pytest.mark.parametrize(
    "source",
    [
        "# Whether it is open. Where it is. When it was.\n",
        "# A sentence about what is read, and of those who read it.\n",
        "a = 1  # noqa: S101\n",
        'a = "What is it? Who knows."\n',
        "# One text.\n\n# Offset of another, and Whole.\n",
    ],
    ids=["other words", "within a sentence", "for a tool", "no comment", "longer words"],
)
def test_other_sentences_are_not_found(source: str) -> None:
    """A sentence with a subject, a comment for a tool and a text of the program are left alone."""
    assert sentences_without_subject(source) == []
