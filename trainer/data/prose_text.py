"""From documentation to paragraphs of prose: code, doctests, tables and headings dropped, the rest unwrapped."""

from __future__ import annotations

import re
from collections.abc import Iterator

MIN_CHARACTERS = 40
MIN_WORDS = 7
_MIN_LETTER_SHARE = 0.78
_MIN_COMMON_SHARE = 0.14

_COMMON = """
the of to and a in is that for it as with be by on not this are or from at an if which can will has have was when but
its all you we may must should one than then other into only any no each they their more used use using there where
these same does do so such return returns set
"""
_COMMON_WORDS = frozenset(_COMMON.split())
_FENCE = ("```", "~~~")
_PROMPTS = (">>>", "...", "In [", "Out[", "$ ")
_UNDERLINE = re.compile(r"[-=~^\"'`#*+_.:<>]{3,}$")
_DIRECTIVE = re.compile(r"\.\. *([\w:-]+)::")
# What stands under these directives is prose; under all others it is code, a table, a formula or an option list.
_PROSE_DIRECTIVES = frozenset(
    {"note", "warning", "tip", "important", "attention", "caution", "hint", "danger", "seealso", "deprecated"}
    | {"versionadded", "versionchanged", "admonition", "topic", "class", "function", "method", "attribute", "module"}
)
_BULLET = re.compile(r"(?:[-*+•]|\(?\d{1,2}[.)]|#+|:[a-z]+(?: [\w*., |\[\]]+)?:|@\w+)\s+")
_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?: *<[^`>]*>)?`")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|`([^`<]+?) *<[^`>]*>`__?")
_MARKS = re.compile(r"`+|\*\*+|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)|</?[a-zA-Z][^<>]*>|\|(?=\w)|(?<=\w)\|")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def paragraphs(text: str) -> list[str]:
    """The English prose paragraphs of a docstring, reStructuredText or Markdown text, one line each."""
    plain = (_plain(block) for block in _blocks(text) if len(block) >= MIN_CHARACTERS)
    return [block for block in plain if _is_prose(block)]


def _blocks(text: str) -> list[str]:
    """Runs of lines of one indentation, joined; a bullet begins a new one, a heading with its underline is dropped."""
    blocks: list[str] = []
    lines: list[str] = []
    indent_of_block = 0
    for indent, line in _text_lines(text):
        bullet = None if line[:1].isalpha() else _BULLET.match(line)
        if lines and (not line or bullet or indent != indent_of_block):
            blocks.append(" ".join(lines))
            lines = []
        if line and not line[0].isalnum() and _UNDERLINE.match(line):
            lines = []  # what stood above it is a heading
        elif line:
            marker = bullet.end() if bullet else 0
            lines.append(line[marker:])
            indent_of_block = indent + marker
    if lines:
        blocks.append(" ".join(lines))
    return blocks


def _text_lines(text: str) -> Iterator[tuple[int, str]]:
    """(indentation, line) without fences, doctests, directives and literal blocks; empty lines part paragraphs."""
    literal_above: int | None = None  # what is indented deeper than this is a literal block
    fenced = doctest = False
    for raw in text.expandtabs(4).splitlines():
        line = raw.strip()
        if not line:
            doctest = False
            yield 0, ""
            continue
        indent = len(raw) - len(raw.lstrip())
        if literal_above is not None and indent <= literal_above:
            literal_above = None
        fence = line.startswith(_FENCE)
        fenced ^= fence
        doctest = doctest or line.startswith(_PROMPTS)
        if fence or fenced or doctest or literal_above is not None or line[0] == "|":
            continue  # a bar begins a row of a table
        if line.startswith(".. "):
            directive = _DIRECTIVE.match(line)
            if directive is None or directive.group(1) not in _PROSE_DIRECTIVES:
                literal_above = indent
        elif line.endswith("::"):
            literal_above = indent
            yield indent, line[:-1]
        else:
            yield indent, line


def _plain(block: str) -> str:
    """A block without inline markup, its spaces single."""
    if "`" in block or "](" in block:
        block = _ROLE.sub(r"\1", block)
        block = _LINK.sub(lambda match: match.group(1) or match.group(2) or "", block)
    if not block.isascii() or any(mark in block for mark in "`*_<|"):
        block = _MARKS.sub("", block)
    return " ".join(block.split())


def _is_prose(block: str) -> bool:
    """Long enough, mostly letters, and with English's common words in it."""
    if len(block) < MIN_CHARACTERS:
        return False
    words = _WORD.findall(block.lower())
    if len(words) < MIN_WORDS:
        return False
    if sum(map(len, words)) + block.count(" ") < _MIN_LETTER_SHARE * len(block):
        return False
    return sum(word in _COMMON_WORDS for word in words) >= _MIN_COMMON_SHARE * len(words)
