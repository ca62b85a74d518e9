"""Planted truth, by a seed: texts with personal data and look-alikes, and pairs of documents of a known similarity.

Check digits are computed here forwards, from their definitions, and not by the code that is under test.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import phonenumbers

NUM_OF_EACH = 16
_NAMES = ["ada", "bert", "chen.wei", "dora_k", "e.f.gauss", "fatima", "george+news", "h-ibsen", "ines77", "jo"]
_HOSTS = ["mail.org", "example.co.uk", "uni-bonn.de", "post.museum", "a-b.io", "sub.domain.net", "firma.fr"]
_REGIONS = "US GB DE FR IT ES IN BR JP PL"
_FORMAT = phonenumbers.PhoneNumberFormat
_SENTENCES = [
    "Please use {} from now on.",
    "It was {}, she said.",
    "({})",
    "My data: {}; thanks",
    "{}",
    "Reach us:\n{}\n- the desk",
]


@dataclass(frozen=True)
class Case:
    """A text, the kind that it is about, and the value in it that is personal or only looks so."""

    kind: str
    form: str
    text: str
    value: str
    is_personal: bool


def personal_data(seed: int = 0) -> list[Case]:
    """Give 16 cases of each form below: some 600 with personal data and some 500 with look-alikes."""
    random = Random(seed)
    return [
        Case(kind, form, text, value, is_personal)
        for forms, is_personal in ((PERSONAL, True), (ALIKE, False))
        for kind, makers in forms.items()
        for form, (template, make) in makers.items()
        for _ in range(NUM_OF_EACH)
        for value in [make(random)]
        for text in [(template or random.choice(_SENTENCES)).format(value)]
    ]


def _digits(random: Random, count: int) -> str:
    return "".join(random.choices(string.digits, k=count))


def _int(random: Random, last: int) -> int:
    return random.randint(1, last)


def _date(random: Random) -> str:
    return f"19{_digits(random, 2)}-0{_int(random, 9)}-1{_int(random, 9)} 12:{9 + _int(random, 50)}:30"


def _private_address(random: Random) -> str:
    return f"{random.choice(['10.0', '192.168', '172.16', '127.0'])}.{_int(random, 255)}.{_int(random, 255)}"


def _letters(random: Random, count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """Random letters, with a digit and a letter among them, as a key of that length nearly always has."""
    return "".join([*random.choices(alphabet, k=count - 2), random.choice("23456789"), random.choice("ABCDEFGH")])


def _luhn(payload: str) -> str:
    total = 0
    for place, digit in enumerate(reversed(payload)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value // 10 + value % 10
    return payload + str((10 - total) % 10)


def _grouped(digits: str, sizes: tuple[int, ...], mark: str) -> str:
    parts, start = [], 0
    for size in sizes:
        parts.append(digits[start : start + size])
        start += size
    return mark.join(parts)


def _card(random: Random, prefix: str, length: int, sizes: tuple[int, ...], mark: str, fault: int = 0) -> str:
    digits = _luhn(prefix + _digits(random, length - 1 - len(prefix)))
    return _grouped(digits[:-1] + str((int(digits[-1]) + fault) % 10), sizes, mark)


def _iban(random: Random, country: str, body: str, mark: str, fault: int = 0) -> str:
    """`body` has a digit for each 0 and a letter for each A."""
    account = "".join(random.choice(string.digits if sign == "0" else string.ascii_uppercase) for sign in body)
    number = int("".join(str(string.digits.find(c) if c in string.digits else ord(c) - 55) for c in account + country + "00"))
    code = f"{country}{(98 - number % 97 + fault - 1) % 97 + 1:02d}{account}"
    return mark.join(code[start : start + 4] for start in range(0, len(code), 4))


def _email(random: Random) -> str:
    return f"{random.choice(_NAMES)}{random.choice(['', '', '1', '.x'])}@{random.choice(_HOSTS)}"


def _ipv4(random: Random) -> str:
    parts = [random.choice([8, 23, 52, 81, 142, 151, 185, 203]), _int(random, 250), random.randint(114, 250), _int(random, 254)]
    return ".".join(map(str, parts))


def _ipv6(random: Random) -> str:
    groups = [f"{random.randint(1, 0xFFFF):x}" for _ in range(6)]
    return (
        random.choice(["2a00:1450", "2606:4700", "2620:fe"])
        + ":"
        + random.choice([":".join(groups), f":{groups[0]}", f"{groups[0]}::{groups[1]}"])
    )


def _phone(random: Random, style: int, regions: str) -> str:
    kind = random.choice([phonenumbers.PhoneNumberType.FIXED_LINE, phonenumbers.PhoneNumberType.MOBILE])
    while True:
        number = phonenumbers.example_number_for_type(random.choice(regions.split()), kind)
        changed = phonenumbers.PhoneNumber(number.country_code, number.national_number // 1000 * 1000 + random.randint(0, 999))
        if phonenumbers.is_valid_number(changed):
            return phonenumbers.format_number(changed, style)


def _dni(random: Random, fault: int = 0) -> str:
    number = random.randint(10_000_000, 99_999_999)
    return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[(number + fault) % 23]}"


def _nie(random: Random) -> str:
    first, number = random.randint(0, 2), random.randint(0, 9_999_999)
    return f"{'XYZ'[first]}{number:07d}{'TRWAGMYFPDXBNJZSQVHLCKE'[(first * 10_000_000 + number) % 23]}"


def _nir(random: Random, fault: int = 0) -> str:
    head = f"{random.randint(1, 2)}{_digits(random, 2)}{random.randint(1, 12):02d}{random.randint(10, 95)}{_digits(random, 6)}"
    return _grouped(head + f"{(97 - int(head) % 97 + fault - 1) % 97 + 1:02d}", (1, 2, 2, 2, 3, 3, 2), " ")


def _cpf(random: Random, fault: int = 0) -> str:
    digits = [random.randint(0, 9) for _ in range(8)] + [7]
    for _ in range(2):
        rest = sum((len(digits) + 1 - place) * digit for place, digit in enumerate(digits)) % 11
        digits.append(0 if rest < 2 else 11 - rest)
    digits[-1] = (digits[-1] + fault) % 10
    code = "".join(map(str, digits))
    return f"{code[:3]}.{code[3:6]}.{code[6:9]}-{code[9:]}"


def _ssn(random: Random, areas: list[int]) -> str:
    return f"{random.choice(areas):03d}-{random.randint(1, 99):02d}-{random.randint(1, 9999):04d}"


def _nino(random: Random) -> str:
    return _grouped(
        random.choice(["AB", "CE", "JG", "PW"]) + _digits(random, 6) + random.choice("ABCD"),
        (2, 2, 2, 2, 1),
        random.choice(["", " "]),
    )


def _sin(random: Random, fault: int = 0) -> str:
    digits = _luhn(random.choice("1234567") + _digits(random, 7))
    return _grouped(digits[:-1] + str((int(digits[-1]) + fault) % 10), (3, 3, 3), "-")


def _person_number(random: Random, fault: int = 0) -> str:
    digits = _luhn(f"{random.randint(40, 99)}{random.randint(1, 12):02d}{random.randint(1, 28):02d}{_digits(random, 3)}")
    return f"{digits[:6]}-{digits[6:9]}{(int(digits[9]) + fault) % 10}"


def _isbn13(random: Random) -> str:
    body = "978" + _digits(random, 9)
    check = -sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body)) % 10
    return _grouped(f"{body}{check}", (3, 1, 4, 4, 1), "-")


def _private_key(random: Random) -> str:
    body = "\n".join(_letters(random, 64) for _ in range(5))
    return f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----"


Make = Callable[[Random], str]
Forms = dict[str, dict[str, tuple[str, Make]]]
"""Kind, form, and the sentence ("" for any) with the maker of the value in it."""

PERSONAL: Forms = {
    "EMAIL": {
        "plain": ("", _email),
        "in capitals": ("", lambda random: _email(random).upper()),
        "of a mail link": ('<a href="mailto:{}">write</a>', _email),
        "at the end": ("For more, write to {}.", _email),
        "spelt out": ("", lambda random: f"{random.choice(_NAMES[:4])} [at] {random.choice(['mail', 'post'])} [dot] org"),
    },
    "PHONE": {
        "of the region": ("", lambda random: _phone(random, _FORMAT.NATIONAL, "US")),
        "international": ("", lambda random: _phone(random, _FORMAT.INTERNATIONAL, _REGIONS)),
        "E.164": ("", lambda random: _phone(random, _FORMAT.E164, _REGIONS)),
        "with dots": ("Call {}!", lambda random: f"650.{_int(random, 398) + 201}.{_digits(random, 4)}"),
        "bare, after its word": ("Phone: {}", lambda random: f"212{random.randint(201, 599)}{_digits(random, 4)}"),
    },
    "IP": {
        "version 4": ("", _ipv4),
        "version 4 of a server": ("GET http://{}:8080/index.html", _ipv4),
        "version 4 in a log": ('{} - - [10/Oct/2000:13:55:36] "GET / HTTP/1.0" 200', _ipv4),
        "version 6": ("", _ipv6),
        "version 6 of a server": ("curl http://[{}]/", _ipv6),
    },
    "CARD": {
        "in fours": ("", lambda random: _card(random, "4", 16, (4, 4, 4, 4), " ")),
        "with hyphens": ("", lambda random: _card(random, "53", 16, (4, 4, 4, 4), "-")),
        "in one": ("", lambda random: _card(random, "4", 16, (16,), "")),
        "American Express": ("", lambda random: _card(random, "37", 15, (4, 6, 5), " ")),
        "of another issuer": ("", lambda random: _card(random, random.choice(["6011", "3530", "2301"]), 16, (16,), "")),
    },
    "IBAN": {
        "German in fours": ("", lambda random: _iban(random, "DE", "0" * 18, " ")),
        "French in one": ("", lambda random: _iban(random, "FR", "0" * 20 + "A00", "")),
        "British in fours": ("", lambda random: _iban(random, "GB", "AAAA" + "0" * 14, " ")),
        "Dutch in one": ("", lambda random: _iban(random, "NL", "AAAA" + "0" * 10, "")),
        "Norwegian in fours": ("", lambda random: _iban(random, "NO", "0" * 11, " ")),
    },
    "NATIONAL_ID": {
        "United States": ("", lambda random: _ssn(random, [1, 78, 219, 457, 665, 772, 899])),
        "Britain": ("", _nino),
        "Spain": ("", _dni),
        "Spain, foreigner": ("", _nie),
        "France": ("", _nir),
        "Brazil": ("", _cpf),
        "Canada": ("", _sin),
        "Sweden": ("", _person_number),
    },
    "SECRET": {
        "cloud key": ("", lambda random: "AKIA" + _letters(random, 16, string.ascii_uppercase + "234567")),
        "repository token": ("", lambda random: f"ghp_{_letters(random, 36)}"),
        "chat token": ("", lambda random: f"xoxb-{_digits(random, 11)}-{_letters(random, 24)}"),
        "payment key": ("", lambda random: f"sk_live_{_letters(random, 24)}"),
        "web token": ("", lambda random: f"eyJ{_letters(random, 17)}.eyJ{_letters(random, 40)}.{_letters(random, 43)}"),
        "private key": ("{}", _private_key),
        "assigned": ('api_key = "{}"', lambda random: _letters(random, 32)),
        "of an environment file": ("DB_PASSWORD={}\n", lambda random: _letters(random, 20)),
        "in an address": ("postgres://app:{}@db.internal/main", lambda random: _letters(random, 12)),
    },
}  # fmt: skip
ALIKE: Forms = {
    "EMAIL": {
        "without a domain": ("", lambda random: f"{random.choice(_NAMES)}@localhost"),
        "a decorator": ("{}\ndef test(): ...", lambda random: f"@pytest.mark.{random.choice(['slow', 'gpu'])}"),
        "a picture": ("", lambda random: f"logo{random.randint(1, 9)}@{random.randint(2, 3)}x.png"),
        "a package": ("npm install {}", lambda random: f"left-pad@{_int(random, 9)}.{_int(random, 9)}.{_int(random, 9)}"),
        "a repository": ("git clone {}", lambda random: f"git@github.com:{random.choice(_NAMES[:2])}/code.git"),
    },
    "PHONE": {
        "a book": ("ISBN {}", lambda random: _isbn13(random)),
        "a paper": ("doi: {}", lambda random: f"10.1093/{_digits(random, 10)}"),
        "a bare number": ("", lambda random: f"212{random.randint(201, 599)}{_digits(random, 4)}"),
        "a date and time": ("", _date),
        "years": ("", lambda random: f"{random.randint(1500, 1899)}-{random.randint(1900, 1999)}"),
        "an amount": ("", lambda random: f"{random.randint(1, 99)},{_digits(random, 3)},{_digits(random, 3)}.00"),
    },
    "IP": {
        "a private network": ("", _private_address),
        "a version": ("We run version {} here.", _ipv4),
        "a section": ("see section {}", lambda random: ".".join(str(random.randint(1, 9)) for _ in range(4))),
        "a browser": ("Firefox/{}", _ipv4),
        "an object identifier": ("", lambda random: f"1.3.6.1.4.{random.randint(1, 999)}"),
        "above 255": ("", lambda random: f"{random.randint(256, 999)}.{random.randint(1, 9)}.2.1"),
        "code": ("", lambda random: f"{random.choice(['std', 'abe', 'dead'])}::{random.choice(['add', 'beef', 'fade'])}"),
        "an address of the manual": ("", lambda random: f"2001:db8::{random.randint(1, 9999):x}"),
    },
    "CARD": {
        "a wrong check digit": ("", lambda random: _card(random, "4", 16, (4, 4, 4, 4), " ", random.randint(1, 9))),
        "no issuer": ("", lambda random: _card(random, "9", 16, (4, 4, 4, 4), " ")),
        "a fraction": ("0.{}", lambda random: _card(random, "4", 16, (16,), "")),
        "a time in milliseconds": ("", lambda random: f"17{_digits(random, 11)}"),
        "a hash": ("", lambda random: f"{_card(random, '4', 16, (16,), '')}{_letters(random, 24, 'abcdef0123456789')}"),
    },
    "IBAN": {
        "a wrong check number": ("", lambda random: _iban(random, "DE", "0" * 18, " ", random.randint(1, 95))),
        "too short": ("", lambda random: _iban(random, "DE", "0" * 17, " ")),
        "no country": ("", lambda random: _iban(random, "XX", "0" * 18, "")),
        "in a word": ("", lambda random: f"ID{_iban(random, 'NL', 'AAAA' + '0' * 10, '')}"),
    },
    "NATIONAL_ID": {
        "United States, not given out": ("", lambda random: _ssn(random, [0, 666, 900, 987])),
        "Spain, wrong letter": ("", lambda random: _dni(random, random.randint(1, 22))),
        "France, wrong key": ("", lambda random: _nir(random, random.randint(1, 95))),
        "Brazil, wrong check digit": ("", lambda random: _cpf(random, random.randint(1, 9))),
        "Sweden, wrong check digit": ("", lambda random: _person_number(random, random.randint(1, 9))),
        "Canada, wrong check digit": ("", lambda random: _sin(random, random.randint(1, 9))),
        "a part": ("part {}", lambda random: f"{_ssn(random, [219])}-{random.randint(10, 99)}"),
    },
    "SECRET": {
        "a placeholder": ("api_key={}", lambda random: f"YOUR_API_KEY_{_digits(random, 3)}"),
        "a call": ("password = {}", lambda random: f"get_password_{random.randint(1, 9)}(os.environ)"),
        "a commit": ("fixed in {}", lambda random: _letters(random, 40, "abcdef0123456789").lower()),
        "an identity": ("", lambda random: _grouped(_letters(random, 32, "abcdef0123456789").lower(), (8, 4, 4, 4, 12), "-")),
        "prose": ("The secret: {}", lambda random: random.choice(["everybody-already-knew-it", "honesty-and-patience-win"])),
    },
}  # fmt: skip


def near_duplicates(
    jaccard: float, num_pairs: int, seed: int = 0, num_words: int = 600
) -> list[tuple[list[str], list[str], float]]:
    """Give pairs of texts with about this Jaccard similarity of their 5-word shingles, and the exact one of each.

    Every word is used once, so that n words replaced far from each other take 5n shingles away.
    """
    random = Random(f"{seed} {jaccard}")
    num_shingles = num_words - 4
    num_lost = num_shingles * (1 - jaccard) / (1 + jaccard)  # s = (n - k) / (n + k)
    pairs = []
    for pair in range(num_pairs):
        text = [f"w{jaccard}x{pair}x{number}" for number in range(num_words)]
        other = list(text)
        lost: set[int] = set()
        while len(lost) < num_lost:
            place = random.randrange(num_words)
            other[place] = f"v{jaccard}x{pair}x{place}"
            lost |= set(range(max(0, place - 4), min(place + 1, num_shingles)))
        pairs.append((text, other, (num_shingles - len(lost)) / (num_shingles + len(lost))))
    return pairs
