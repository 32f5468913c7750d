"""What parsers of foreign bytes are tried with."""

from __future__ import annotations

from hypothesis import HealthCheck
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.rounds import rounds

# What is given here replaces what the profile suppresses.
SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FEW = examples(max_examples=rounds(20, 200), deadline=None, suppress_health_check=SUPPRESSED)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
