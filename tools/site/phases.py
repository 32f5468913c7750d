"""Draws ARCHITECTURE.md's state diagram for the site, which has no other program for that.

GitHub draws it from the same text (Mermaid).  States are columns and their arrows are rows, so that
long reasons have room and nothing has to be laid out.
"""

from __future__ import annotations

import re
from html import escape

_ARROW = re.compile(r"^ *(\S+) --> (\S+?)(?: : (.+))?$", re.MULTILINE)
_BEGIN, _END = "(begin)", "(end)"
_COLUMN, _HEAD, _ROW = 110, 44, 40
#: The approximate width of a letter.
_LETTER = 6.2


def picture(diagram: str) -> str:
    """Return a state diagram of Mermaid as HTML with an SVG, in the colours of the text around.

    Raises ValueError for a diagram without an arrow.
    """
    arrows = [
        (_BEGIN if a == "[*]" else a, _END if b == "[*]" else b, why or "")
        for a, b, why in _ARROW.findall(diagram)
    ]
    if not arrows:
        raise ValueError(f"no arrow in {diagram!r}")
    states = [*dict.fromkeys(a for a, _, _ in arrows), _END]
    middle = {state: _COLUMN * n + _COLUMN // 2 for n, state in enumerate(states)}
    width, height = _COLUMN * len(states), _HEAD + _ROW * len(arrows) + 8
    said = "; ".join(f"{a} to {b}" + (f": {why}" if why else "") for a, b, why in arrows)
    lines = [
        # With tabindex, because a scrolling part must be reachable by keys.
        '<div class="drawing" tabindex="0">',
        f'<svg class="phases" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(said)}"'
        ' fill="none" stroke="currentColor" font-size="12">',
    ]
    for state, x in middle.items():
        lines += [
            f'<path stroke-opacity=".3" d="M{x} 30V{height}"/>',
            f'<rect x="{x - 46}" y="6" width="92" height="24" rx="6"/>',
            f'<text x="{x}" y="22" {_TEXT} text-anchor="middle">{escape(state)}</text>',
        ]
    for row, (a, b, why) in enumerate(arrows):
        y, begin, end = _HEAD + _ROW * row + 28, middle[a], middle[b]
        back = 7 if end > begin else -7
        # Beginning above the arrow, but within the picture.
        x = max(4.0, min(min(begin, end) + 6.0, width - 4 - _LETTER * len(why)))
        lines += [
            f'<path d="M{begin} {y}H{end}m{-back} -4l{back} 4l{-back} 4"/>',
            f'<text x="{x:.0f}" y="{y - 7}" {_TEXT}>{escape(why)}</text>',
        ]
    return "\n".join([*lines, "</svg>", "</div>"])


_TEXT = 'fill="currentColor" stroke="none"'
