"""Money: whole nano-dollars (1e-9 USD), so that sums are exact, and their text for people."""

from __future__ import annotations

NANO = 1_000_000_000


def dollars(nanos: int) -> float:
    """Return an amount for JSON and charts; below a million dollars its digits are exact. Never summed."""
    return nanos / NANO


def text(nano: int) -> str:
    """Return dollars as text: with cents from one dollar up, with as many decimals as needed below."""
    if abs(nano) >= NANO or not nano:
        places = 2
    elif abs(nano) >= NANO // 100:
        places = 4
    else:
        places = 6 if abs(nano) >= 1_000 else 9
    return f"{'-' if nano < 0 else ''}${abs(nano) / NANO:,.{places}f}"
