"""The names that socketprotector-exporter imports from this distribution, besides `__version__`.

Importing these names needs no third-party package.  If you change or remove a name, change the
exporter in the same commit.
"""

from __future__ import annotations

from ..model import text
from ..model.errors import Refusal, SystemRefused, UsageError
from ..model.text import escape, in_one_line, whole
from ..model.wait_quantiles import quantile_us
from ..system import env_file
from ..system.answer import Answering
from ..system.cleanup import on_error
from ..system.terminal import keep_exit_status, open_missing_standard_streams
from . import discovery
from .client import LONGEST_LINE, VERSION, Message, connect
from .errors import NoProtector, RequestRefused
from .fields import (
    Status,
    failing,
    is_lame_duck,
    label,
    listed,
    measure,
    number_in,
    other_waits_of,
    rollout_of,
    rollout_text,
    serves,
    share_of,
    text_in,
    unhealthy,
    valid_dry_run,
    why_not_ready,
)
from .message import message_in
from .query_all import SocketAnswer, query_all

__all__ = [
    "LONGEST_LINE",
    "VERSION",
    "Answering",
    "Message",
    "NoProtector",
    "Refusal",
    "RequestRefused",
    "SocketAnswer",
    "Status",
    "SystemRefused",
    "UsageError",
    "connect",
    "discovery",
    "env_file",
    "escape",
    "failing",
    "in_one_line",
    "is_lame_duck",
    "keep_exit_status",
    "label",
    "listed",
    "measure",
    "message_in",
    "number_in",
    "on_error",
    "open_missing_standard_streams",
    "other_waits_of",
    "quantile_us",
    "query_all",
    "rollout_of",
    "rollout_text",
    "serves",
    "share_of",
    "text",
    "text_in",
    "unhealthy",
    "valid_dry_run",
    "whole",
    "why_not_ready",
]
