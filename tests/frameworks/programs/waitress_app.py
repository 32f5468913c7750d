"""waitress."""

from __future__ import annotations

import sys

from socketprotector_client.waitress import serve

from tests.frameworks.programs.pages import wsgi

serve(wsgi, sys.argv[1])
