"""`python -m socketprotector.stdio`: programs/stdio, by the name that docs/stdio.md gives.

Protectors from before programs/ import `main` from here, too.
"""

from __future__ import annotations

from ..programs.stdio.__main__ import main

if __name__ == "__main__":
    main()
