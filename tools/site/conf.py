"""The configuration with which Sphinx builds the site: `make docs` builds it in build/site.

The pages are the Markdown files of the repository, as GitHub shows them, without any text
for Sphinx.  This module adds the site's own parts to their text when Sphinx reads them:

* README.md is the front page, index.html; docs/index.md is a list of links for each shelf, and
  the front page gets the same lists as tables of contents, for the sidebar;
* `<!-- autodoc MODULE -->` becomes the reference of MODULE's public names, by their docstrings;
* a link to a folder, or to a page that stands beside a test or a bench, leads into the repository;
* a link with a file's name as its text (`[log.md](log.md)`) gets that page's title;
* a diagram is drawn;
* the kinds of blocks that only tests know (tests/pages/page.py) are shown as plain text; output
  and drawings get a class, which marks them as nothing to copy.
"""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client_lib"), str(Path(__file__).parent)]

import phases  # noqa: E402 -- beside this file

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "SocketProtector"
version = release = PROJECT["version"]
html_title = f"SocketProtector {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "man_page"]
root_doc = "README"
include_patterns = [
    "*.md",
    "client_lib/README.md",
    "docs/*.md",
    *("docs/man/*.[18]", "client_lib/man/*.1", "exporter/man/*.8"),
]
#: socketprotector.8 is another name of SocketProtector.8.
exclude_patterns = [".*", "build", "dist", "docs/man/socketprotector.8"]

myst_heading_anchors = 6
highlight_language = "text"
# Smart quotes would turn the two dashes of an option into one.
smartquotes = False
# Docstrings are plain text with `names`.
default_role = "code"
autodoc_member_order = "bysource"
# Names of the standard library, which a build without network cannot look up, and names that only
# a type checker sees.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!socketprotector_client\b).*"),
    (r"py:class", r"socketprotector_client\.process\.Has.*"),
]

html_theme = "furo"
templates_path = ["templates"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = [("copy.js", {"defer": "defer"})]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_use_index = False
html_domain_indices = False
html_theme_options = {"top_of_page_buttons": []}

_ALL_PAGES = "docs/index.md"
_SHELF = re.compile(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^\* \[([^\]]*)\]\(([^)#]*)\)", re.MULTILINE)
_AUTODOC = re.compile(r"^<!-- autodoc (\w+) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_NAMED_BY_FILE = re.compile(r"(?<!!)\[[\w./-]+\.md\]\(((?![a-z]+:)[^)#\s]+\.md)(#[^)\s]*)?\)")
_MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r"^# (.*)$", re.MULTILINE)
#: Blocks for which Pygments has no lexer, or an unsuitable one of the same name.
_PLAIN = re.compile(r"^```(?:apparmor|conf|haproxy|postinst)$", re.MULTILINE)
_OUTPUT = re.compile(
    r"^```(?:control|json status|line|message|report|text(?: terminal)?)$", re.MULTILINE
)
_DRAWING = re.compile(r"^```drawing$", re.MULTILINE)
#: Fixes of the theme for axe-core: scrolling parts must be reachable by keys, headings need a
#: level, landmarks a name, and an empty cell must not head a column.
_ACCESSIBLE = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="All pages">',
    '<aside class="toc-drawer">': '<aside class="toc-drawer" aria-label="This page">',
    '<div class="table-wrapper': '<div tabindex="0" class="table-wrapper',
    '<th class="head"><p></p></th>': "<td></td>",
    '<div class="drawing highlight-text notranslate"><div class="highlight"><pre>': (
        '<div class="drawing highlight-text notranslate"><div class="highlight"><pre tabindex="0">'
    ),
}
_TAG = re.compile(r"(</?(\w+)[^>]*>)")
_WITH_OPTIONS = {"code", "pre", "strong"}
_DASHES = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
#: `-- COMMAND`, as code in a sentence and as the output of the shell lexer.
_SEPARATOR = re.compile(
    r'<span class="pre">--</span> <span class="pre">[^<]+</span>'
    r'|(?<![\w!-])--(?: |<span class="w"> </span>)(?:<span class="\w+">[^\s<]+</span>|[^\s<]{1,24})'
)


def _shelves() -> str:
    """Return each list of docs/index.md as a table of contents of README.md."""
    lines = []
    for number, shelf in enumerate(_SHELF.finditer((ROOT / _ALL_PAGES).read_text("utf-8"))):
        entries = [
            (name, posixpath.normpath(f"docs/{path}")) for name, path in _ENTRY.findall(shelf[2])
        ]
        lines += ["", "```{toctree}", ":hidden:", f":caption: {shelf[1]}", ""]
        for name, path in entries:
            target = posixpath.splitext(path)[0]
            lines.append(f"{name} <{'self' if target == root_doc else target}>")
        lines += [f"All pages <{posixpath.splitext(_ALL_PAGES)[0]}>"] * (number == 0)
        lines += ["```", ""]
    return "\n".join(lines)


def _documented(found: re.Match[str]) -> str:
    """Return the reference of a module's public names: functions, then classes, then errors."""
    module = importlib.import_module(found[1])
    sorts: dict[str, list[str]] = {"function": [], "class": [], "exception": []}
    for name in module.__all__:
        value = getattr(module, name)
        sort = "function" if not isinstance(value, type) else "class"
        is_error = isinstance(value, type) and issubclass(value, Exception)
        sorts["exception" if is_error else sort].append(name)
    lines = ["```{eval-rst}", f".. module:: {found[1]}", ""]
    for sort, names in sorts.items():
        for name in names:
            lines.append(f".. auto{sort}:: {found[1]}.{name}")
            lines += ["   :members:", ""] if sort == "class" else [""]
    return "\n".join([*lines, "```"])


def _prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".md":
        return

    def outside(found: re.Match[str]) -> str:
        target = (path.parent / found[2]).resolve()
        kept = target.relative_to(ROOT).as_posix()
        if not target.is_dir() and (
            target.suffix != ".md" or kept.removesuffix(".md") in app.env.found_docs
        ):
            return found[0]
        kind = "tree" if target.is_dir() else "blob"
        title = _TITLE.search(target.read_text("utf-8")) if found[1].endswith(".md") else None
        shown = title[1] if title else found[1]
        return f"[{shown}]({PROJECT['urls']['Source']}/{kind}/main/{kept}{found[3] or ''})"

    def titled(found: re.Match[str]) -> str:
        title = _TITLE.search((path.parent / found[1]).read_text(encoding="utf-8"))
        return f"[{title[1]}]({found[1]}{found[2] or ''})" if title else found[0]

    text = _NAMED_BY_FILE.sub(titled, _LINK.sub(outside, source[0]))
    text = _OUTPUT.sub("```{code-block} text\n:class: output\n", text)
    text = _DRAWING.sub("```{code-block} text\n:class: drawing\n", text)
    text = _MERMAID.sub(lambda found: phases.picture(found[1]), _PLAIN.sub("```text", text))
    if docname == root_doc:
        text += _shelves()
    source[0] = _AUTODOC.sub(_documented, text)


def _with_whole_options(html: str) -> str:
    """Return a page on which no line of code ends in dashes: of an option, or before a command."""
    parts = _TAG.split(_SEPARATOR.sub(_whole, html))  # text, tag, its name, text, ...
    depth = 0
    for at in range(0, len(parts), 3):
        if at and parts[at - 1] in _WITH_OPTIONS:
            depth += -1 if parts[at - 2].startswith("</") else 1
        if depth:
            parts[at] = _DASHES.sub(_whole, parts[at])
    return "".join(part for at, part in enumerate(parts) if at % 3 != 2)


def _whole(found: re.Match[str]) -> str:
    return f'<span class="option">{found[0]}</span>'


def _finish(app: Sphinx, error: Exception | None) -> None:
    for path in Path(app.outdir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for theirs, ours in _ACCESSIBLE.items():
            text = text.replace(theirs, ours)
        path.write_text(_with_whole_options(text), encoding="utf-8")
    # A copy as the folder's first page; its relative links lead to the same places.
    front = Path(app.outdir, f"{root_doc}.html")
    if front.exists():
        Path(app.outdir, "index.html").write_bytes(front.read_bytes())


def setup(app: Sphinx) -> None:
    app.connect("source-read", _prepare)
    app.connect("build-finished", _finish)
