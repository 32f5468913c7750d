"""Draw the phases of a generation, from the table that the daemon itself walks.

    python docs/draw_phases.py

prints what stands between the `phases` markers in ARCHITECTURE.md; a test compares them.
"""

from __future__ import annotations

from socketprotector.core.fleet import PHASES, Phase


def diagram() -> str:
    """Return the state diagram as a block of mermaid text, which also reads as it is."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {Phase.STARTING.value}"]
    for phase, ways in PHASES.items():
        for target, why in ways.items():
            name = target.value if target else "[*]"
            lines.append(f"    {phase.value} --> {name} : {why}")
    return "\n".join([*lines, "```"])


if __name__ == "__main__":
    print(diagram())
