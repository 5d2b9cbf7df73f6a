"""In what two nested mappings differ, in words."""

import re
from collections.abc import Mapping
from typing import Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One `name: before → now` for each entry in which two nested mappings differ."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new)
        elif old != new:
            found.append(f"{name}: {_short(old)} → {_short(new)}")
    return found


def _short(value: Any) -> str:
    """As text, of SHA-256 digests the beginning."""
    text = str(value)
    return f"{text[:8]}…" if re.fullmatch("[0-9a-f]{64}", text) else text
