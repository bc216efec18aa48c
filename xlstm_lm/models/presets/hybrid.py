"""Mixed blocks, and single mixers that have no family of their own, of the sizes of the xLSTMs."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {}
