"""What a response tells of its prompt: how many tokens had been read before and were not read again.

OpenAI's responses say so in their usage, where the handlers of ``transformers serve`` say nothing, or 0.
"""

from __future__ import annotations

import json
from typing import Any

_DETAILS = {"prompt_tokens": "prompt_tokens_details", "input_tokens": "input_tokens_details"}  # completions, responses
_DATA, _USAGE = "data: ", '"usage":{'


def with_cached_tokens(response: dict[str, Any], cached: int) -> dict[str, Any]:
    """A response, or an event of a stream, whose usage tells of ``cached`` tokens; as it is if it has no usage."""
    told = dict(response)
    if isinstance(inner := told.get("response"), dict):  # the last event of /v1/responses
        told["response"] = with_cached_tokens(inner, cached)
    usage = told.get("usage")
    if isinstance(usage, dict):
        told["usage"] = dict(usage)
        for count, details in _DETAILS.items():
            if count in usage:
                told["usage"][details] = {**(usage.get(details) or {}), "cached_tokens": cached}
    return told


def events_with_cached_tokens(events: str, cached: int) -> str:
    """The same for server-sent events, each of them a line ``data: {...}`` and an empty one."""
    # A long text is thousands of events, and only the last has a usage. Within text, quotes would be escaped.
    if _USAGE not in events:
        return events
    return "\n".join(_told(line, cached) for line in events.split("\n"))  # not splitlines: U+2028 may be in a text


def _told(line: str, cached: int) -> str:
    payload = line.removeprefix(_DATA)
    if payload == line or _USAGE not in payload:
        return line
    told = with_cached_tokens(json.loads(payload), cached)
    return _DATA + json.dumps(told, ensure_ascii=False, separators=(",", ":"))
