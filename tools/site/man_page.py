"""A parser of manual pages, which makes them pages of the site.

It knows only the macros of man(7) in our manual pages; any other is an error, with its line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.parsers import Parser

_ARGUMENT = re.compile(r'"([^"]*)"|(\S+)')
_FONT = re.compile(r"\\f([BIRP])")
_ESCAPE = re.compile(r"\\([-&e])")
_ESCAPES = {"-": "-", "&": "", "e": "\\"}
_FONTS = {"B": nodes.strong, "I": nodes.emphasis}


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda found: _ESCAPES[found[1]], text)


def _words(rest: str) -> list[str]:
    return [quoted or bare for quoted, bare in _ARGUMENT.findall(rest)]


def _inline(text: str, font: str = "R") -> Iterator[nodes.Node]:
    """Return a piece of text, in which \\fB, \\fI, \\fR and \\fP change the font."""
    for index, part in enumerate(_FONT.split(text)):
        if index % 2:
            font = "R" if part == "P" else part
        elif part:
            plain = _plain(part)
            yield _FONTS[font](plain, plain) if font in _FONTS else nodes.Text(plain)


class ManPage(Parser):
    """Sphinx's parser of the files whose names end in a section's number."""

    supported = ("man",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        self._document = document
        self._here = document.settings.env
        self._sections: list[nodes.Element] = [document]
        self._text: nodes.Element | None = None  # the paragraph that text goes to
        self._terms: nodes.definition_list | None = None
        self._is_term = False  # whether the next text is a term
        self._literal: list[str] | None = None
        for number, line in enumerate(inputstring.splitlines(), 1):
            try:
                self._read(line)
            except (AttributeError, KeyError, IndexError) as error:
                raise ValueError(
                    f"{document['source']}:{number}: not known here: {line}"
                ) from error

    def _read(self, line: str) -> None:
        macro, _, rest = line.partition(" ")
        if self._literal is not None and macro != ".EE":
            self._literal.append(_plain(line))
        elif not line.startswith("."):
            self._put(_inline(line))
        elif macro == r".\"":
            pass
        elif set(macro[1:]) <= set("BIR"):
            self._put(self._in_fonts(macro[1:], rest))
        else:
            getattr(self, "_do_" + macro[1:])(rest)

    def _in_fonts(self, fonts: str, rest: str) -> Iterator[nodes.Node]:
        """Add text: for .B and .I as a whole; for .BR and the like each word in the next font."""
        words = _words(rest)
        if len(fonts) == 1:
            words = [" ".join(words)]
        elif fonts == "BR" and (page := self._page(words[0])) and words[1][0] == "(":
            yield self._link(words[0] + words[1][:3], page)
            words, fonts = [words[1][3:], *words[2:]], "RB"
        for index, word in enumerate(words):
            yield from _inline(word, fonts[index % len(fonts)])

    def _page(self, name: str) -> str | None:
        """Return the page of the site that a program's manual page is."""
        found = [each for each in self._here.project.docnames if each.endswith(f"man/{name}")]
        return found[0] if found else None

    def _link(self, text: str, page: str) -> nodes.Node:
        link = addnodes.pending_xref(
            "", refdomain="std", reftype="doc", reftarget=f"/{page}", refexplicit=True, refwarn=True
        )
        link["refdoc"] = self._here.docname
        link += nodes.inline(text, text)
        return link

    def _put(self, found: Iterable[nodes.Node]) -> None:
        """Add text to the paragraph, or as a term with a paragraph of its own."""
        if self._is_term:
            assert self._terms is not None
            self._is_term = False
            self._text = nodes.paragraph()
            term, definition = nodes.term("", "", *found), nodes.definition("", self._text)
            self._terms += nodes.definition_list_item("", term, definition)
            return
        if self._text is None:
            self._text = nodes.paragraph()
            self._sections[-1] += self._text
        if len(self._text):
            self._text += nodes.Text("\n")
        self._text += list(found)

    def _heading(self, level: int, text: str) -> None:
        del self._sections[level:]
        title = nodes.title("", "", *_inline(text))
        section = nodes.section("", title, names=[nodes.fully_normalize_name(title.astext())])
        self._document.note_implicit_target(section, section)
        self._sections[-1] += section
        self._sections.append(section)
        self._text = self._terms = None

    def _do_TH(self, rest: str) -> None:
        path = Path(self._here.doc2path(self._here.docname))
        self._heading(1, f"{path.stem}({path.suffix[1:]})")

    def _do_SH(self, rest: str) -> None:
        self._heading(2, " ".join(_words(rest)).capitalize())

    def _do_SS(self, rest: str) -> None:
        self._heading(3, " ".join(_words(rest)))

    def _do_PP(self, rest: str) -> None:
        self._text = self._terms = None

    def _do_TP(self, rest: str) -> None:
        if self._terms is None:
            self._terms = nodes.definition_list()
            self._sections[-1] += self._terms
        self._is_term = True

    def _do_IP(self, rest: str) -> None:
        """Begin a further paragraph of the last term; or with a word, a new term."""
        if rest:
            self._do_TP("")
            self._put(_inline(_words(rest)[0]))
        else:
            self._text = nodes.paragraph()
            self._place().append(self._text)

    def _do_br(self, rest: str) -> None:
        self._do_IP("")

    def _place(self) -> nodes.Element:
        """Return the parent of a paragraph that is no term."""
        return self._sections[-1] if self._terms is None else self._terms[-1][1]

    def _do_EX(self, rest: str) -> None:
        self._literal = []

    def _do_EE(self, rest: str) -> None:
        text = "\n".join(self._literal or [])
        block = nodes.literal_block(text, text, language="text")
        self._place().append(block)
        self._literal = self._text = None


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_source_suffix(".1", "man")
    app.add_source_suffix(".8", "man")
    app.add_source_parser(ManPage)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
