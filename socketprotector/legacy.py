"""`python -m socketprotector.legacy`: programs/legacy, by the name that docs/legacy.md gives.

Protectors from before programs/ import `main` from here, too.
"""

from __future__ import annotations

from .programs.legacy.adapter import main

if __name__ == "__main__":
    main()
