"""Whether a string is what it looks like: check digits, lengths and ranges of numbers that name a person or an account.

Each takes the string as it stands in a text, its separators included, and answers yes or no.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from collections.abc import Callable, Sequence

_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS", 23: "AE GI IL", 24: "AD CZ ES MD PK RO SA SE SK TN", 25: "PT", 26: "IS",
        27: "FR GR IT MC SM",
        28: "AL AZ CY DO GT HU LB PL", 29: "BR PS QA UA", 30: "JO KW MU", 31: "MT",
    }.items()
    for country in countries.split()
}  # fmt: skip
"""ISO 13616 registry: characters of an account number in each country."""
_CARD_RANGES = (
    (13, "4", "4"), (16, "4", "4"), (19, "4", "4"), (16, "51", "55"), (16, "2221", "2720"), (15, "34", "34"), (15, "37", "37"),
    (16, "6011", "6011"), (16, "644", "659"), (16, "3528", "3589"), (14, "300", "305"), (14, "36", "36"), (14, "38", "39"),
    (16, "62", "62"),
)  # fmt: skip
"""Digits of a card number, and the first and the last of its issuers' prefixes."""
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_MIN_BITS_PER_CHAR = 3.0
_PLACEHOLDERS = ("example", "your", "xxxx", "changeme", "placeholder", "redacted", "dummy", "****", "test", "sample")


def digits_of(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def has_luhn_check(text: str) -> bool:
    """The last digit makes the Luhn sum a multiple of 10 (ISO/IEC 7812-1, annex B)."""
    doubled = "0246813579"
    digits = digits_of(text)[::-1]
    return sum(map(int, digits[::2])) % 10 == -sum(int(doubled[int(digit)]) for digit in digits[1::2]) % 10


def is_card(text: str) -> bool:
    digits = digits_of(text)
    is_issued = any(len(digits) == length and first <= digits[: len(first)] <= last for length, first, last in _CARD_RANGES)
    return is_issued and has_luhn_check(digits)


def is_iban(text: str) -> bool:
    """ISO 13616: the country's length, and mod 97 equal 1 with the first four characters moved to the end."""
    code = text.replace(" ", "").replace("-", "")
    if _IBAN_LENGTHS.get(code[:2]) != len(code):
        return False
    return int("".join(str(int(letter, 36)) for letter in code[4:] + code[:4])) % 97 == 1


def is_public_address(text: str) -> bool:
    """An IPv4 address that is routed, or an IPv6 one of the only block given out so far (RFC 4291, 2000::/3)."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and (address.version == 4 or address in _GLOBAL_UNICAST)


def is_random(text: str) -> bool:
    """Looks drawn by chance, as keys are: letters and digits, many different ones, and no placeholder."""
    bits = -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())
    is_mixed = any(map(str.isdigit, text)) and any(map(str.isalpha, text))
    return is_mixed and bits >= _MIN_BITS_PER_CHAR and not any(word in text.lower() for word in _PLACEHOLDERS)


def is_us_social_security_number(text: str) -> bool:
    area, group, serial = text[:3], text[4:6], text[7:]
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def is_british_insurance_number(text: str) -> bool:
    return text[:2] not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")


def is_spanish_identity(text: str) -> bool:
    """DNI and NIE: the letter is the number mod 23."""
    number = text[:-1].rstrip("-").translate(str.maketrans("XYZ", "012"))
    return text[-1] == "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23]


def is_french_insurance_number(text: str) -> bool:
    """NIR: the last two digits are 97 less the others mod 97; Corsica's 2A and 2B count as 19 and 18."""
    code = text.replace(" ", "").replace("2A", "19").replace("2B", "18")
    return int(code[-2:]) == 97 - int(code[:-2]) % 97


def is_brazilian_tax_number(text: str) -> bool:
    """CPF: two check digits, each a weighted sum mod 11; eleven equal digits pass the sums and are not given out."""
    digits = [int(digit) for digit in digits_of(text)]
    return len(set(digits)) > 1 and all(digits[size] == _cpf_check(digits[:size]) for size in (9, 10))


def _cpf_check(digits: Sequence[int]) -> int:
    total = sum(digit * weight for digit, weight in zip(digits, range(len(digits) + 1, 1, -1), strict=True))
    return total * 10 % 11 % 10


def is_italian_tax_code(text: str) -> bool:
    """Codice fiscale: the last letter is a sum mod 26 in which characters at odd places count by a table of their own."""
    odd = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", _ITALIAN_ODD, strict=True))
    total = sum(odd[sign] for sign in text[:15:2]) + sum(
        int(sign) if sign.isdigit() else ord(sign) - 65 for sign in text[1:15:2]
    )
    return text[15] == chr(65 + total % 26)


_ITALIAN_ODD = [
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24,
    23,
]  # fmt: skip


def is_swedish_person_number(text: str) -> bool:
    """A date of birth and four digits, the last a Luhn check."""
    month, day = int(text[2:4]), int(text[4:6])
    return 1 <= month <= 12 and 1 <= day <= 31 and has_luhn_check(text)


def is_canadian_insurance_number(text: str) -> bool:
    return text[0] not in "08" and has_luhn_check(text)


NATIONAL_IDS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "US": (r"\d{3}-\d{2}-\d{4}", is_us_social_security_number),
    "GB": (r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]", is_british_insurance_number),
    "ES": (r"(?:\d{8}|[XYZ]-?\d{7})-?[A-HJ-NP-TV-Z]", lambda text: is_spanish_identity(text.replace("-", ""))),
    "FR": (r"[12] ?\d{2} ?(?:0[1-9]|1[0-2]) ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}", is_french_insurance_number),
    "BR": (r"\d{3}\.\d{3}\.\d{3}-\d{2}", is_brazilian_tax_number),
    "IT": (r"[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z]", is_italian_tax_code),
    "SE": (r"\d{6}[-+]\d{4}", is_swedish_person_number),
    "CA": (r"\d{3}([ -])\d{3}\1\d{3}", is_canadian_insurance_number),
}
"""Country (ISO 3166), the form of its number, and the check that tells it from others of that form."""
