"""What stands beside a match, and the sums of digits that several kinds of numbers share. Pure."""

from __future__ import annotations

_NO_SPACES_FROM = 0x2E80
"""Scripts from here on (Chinese, Japanese, Korean …) do not put blanks between words."""
_THAI_TO_KHMER = range(0x0E00, 0x0F00)


def before(data: bytes, start: int) -> str:
    """The character before an offset in UTF-8, empty at the beginning."""
    at = start - 1
    if at >= 0 and data[at] < 0x80:
        return chr(data[at])
    while at > 0 and start - at < 4 and data[at] & 0xC0 == 0x80:
        at -= 1
    return data[max(at, 0) : start].decode("utf-8", "replace")[-1:]


def after(data: bytes, end: int) -> str:
    """The character at an offset in UTF-8, empty at the end."""
    if end < len(data) and data[end] < 0x80:
        return chr(data[end])
    return data[end : end + 4].decode("utf-8", "replace")[:1]


def apart(neighbour: str) -> bool:
    """Whether a number or name may end here: no letter or digit goes on."""
    return not neighbour.isalnum()


def word_goes_on(own: str, neighbour: str) -> bool:
    """Whether a word with the edge ``own`` continues in its neighbour."""
    return _is_of_word(own) and _is_of_word(neighbour)


def _is_of_word(character: str) -> bool:
    if not character or not (character.isalnum() or character == "_"):
        return False
    code = ord(character)
    return code < _NO_SPACES_FROM and code not in _THAI_TO_KHMER


def digits_of(data: bytes, start: int, end: int) -> str:
    """The digits between two offsets."""
    return "".join(chr(byte) for byte in data[start:end] if 0x30 <= byte <= 0x39)


def luhn(number: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    return luhn_sums(number)[-1] % 10 == 0


def luhn_sums(number: str) -> list[int]:
    """The sum of the first n digits for every n, as the check of a number of n digits has it: each
    second digit from the last but one counts double, digit by digit."""
    even = odd = 0  # the sums if digits at even, or at odd, places count double
    sums = [0]
    for place, digit in enumerate(number):
        value = int(digit)
        double = value * 2 - 9 * (value > 4)
        even, odd = (even + double, odd + value) if place % 2 == 0 else (even + value, odd + double)
        sums.append(odd if place % 2 == 0 else even)
    return sums


def weighted(number: str, weights: tuple[int, ...]) -> int:
    """The sum of the digits, each times its weight."""
    return sum(int(digit) * weight for digit, weight in zip(number, weights, strict=False))
