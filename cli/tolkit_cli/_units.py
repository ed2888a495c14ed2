"""Numbers as people read them: decimal bytes, counts, durations."""

from __future__ import annotations

__all__ = [
    "amount_text",
    "bytes_text",
    "count_text",
    "duration_text",
    "number_text",
    "percent_text",
]

_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def bytes_text(size_bytes: float) -> str:
    """12_600_000_000 -> "12.60 GB"; decimal units, as disks and the paper count."""
    for scale, letter in _DECIMAL:
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.2f} {letter}B"
    return f"{size_bytes:.0f} B"


def count_text(count: float) -> str:
    """81_920 -> "81,920"; above a million "1.9 M"; small rates keep a decimal."""
    for scale, letter in _DECIMAL[:3]:
        if abs(count) >= scale:
            return f"{count / scale:.2f} {letter}"
    if abs(count) < 10 and count != int(count):
        return f"{count:.1f}"
    return f"{count:,.0f}"


def duration_text(elapsed_s: float) -> str:
    """Seconds below a minute ("4.2 s"), then m:ss, then h:mm:ss."""
    if elapsed_s < 60:
        return f"{elapsed_s:.1f} s"
    minutes, seconds = divmod(round(elapsed_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def amount_text(count: float, unit: str) -> str:
    """A count with its unit, in the plural where it is not one; bytes get decimal prefixes."""
    if unit == "B":
        return bytes_text(count)
    text = count_text(count)
    return f"{text} {unit}" if text == "1" or unit.endswith("s") else f"{text} {unit}s"


def number_text(value: float) -> str:
    """Four decimals where they say something, an exponent where they do not."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.2e}"


def percent_text(ratio: float, digits: int = 3, *, signed: bool = False) -> str:
    """A ratio as a percentage: 0.0123 -> "1.230 %"; signed "+1.230 %", but never "-0.000 %"."""
    text = f"{100 * ratio:.{digits}f}"
    if float(text) == 0:
        return f"{0:.{digits}f} %"
    return f"+{text} %" if signed and ratio > 0 else f"{text} %"
