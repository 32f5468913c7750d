"""Prints each module of the product with the first sentence of its docstring, by folder.

python tools/modules.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: The packages of the product, from the supervisor outwards.
PACKAGES = (
    "socketprotector",
    "client_lib/socketprotector_client",
    "exporter/socketprotector_exporter",
)


def first_sentence(text: str) -> str:
    """Return the first sentence of a module's docstring, on one line; "": there is none."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(".  ")
    return sentence.partition(". ")[0].rstrip(".") if not stop else sentence


def described() -> dict[Path, str]:
    """Return the first sentence of each module, by its path from the root."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py"), key=lambda each: (each.parent, each)):
            text = ast.get_docstring(ast.parse(_beginning(path.read_text("utf-8")))) or ""
            found[path.relative_to(ROOT)] = first_sentence(text)
    return found


def _beginning(source: str) -> str:
    """Return the docstring's part of a source; parsing all of each takes a second."""
    end = source.find('"""', 3) if source.startswith('"""') else -1
    return source[: end + 3] if end >= 0 else source


def main() -> None:
    folder = None
    for path, sentence in described().items():
        if path.parent != folder:
            folder = path.parent
            print(f"\n{folder}/")
        print(f"    {path.name:<26} {sentence}")


if __name__ == "__main__":
    main()
