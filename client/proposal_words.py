"""How alike two names of columns are, and which of the schema's categories a bank's own code spells. Pure and public.

Nothing here sees a table: names and codes come in, and what they may mean goes out.
"""

import itertools
import re
import unicodedata
from difflib import SequenceMatcher
from typing import Final, Literal

Meaning = Literal["bad", "good"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UMLAUTS: Final = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss", "ø": "oe", "æ": "ae", "å": "aa"})
_NOISE: Final = _words("eur usd gbp chf cur ccy col fld fl cd flag flg ind kz the of in by a")
"""Units, and what data warehouses add to every name; they tell columns apart only where nothing else does."""

_SAME: Final[dict[str, str]] = {
    own: word
    for word, others in {
        "amount": "amt betrag volume vol sum",
        "approved": "appr approv appv approval granted",
        "guaranteed": "guar guarantee grntd garantie",
        "number": "nr no num cnt count nbr anzahl",
        "identifier": "id key ident",
        "customer": "cust client kunde kunden borrower debtor",
        "employees": "empl emp employee staff headcount mitarbeiter",
        "year": "yr jahr fy vintage",
        "date": "dt datum",
        "income": "inc einkommen salary",
        "age": "alter",
        "purpose": "zweck verwendungszweck usage",
        "sector": "branche industry naics nace sic",
        "segment": "seg",
        "revolving": "rev revolver revolv",
        "business": "bus biz firm company unternehmen",
        "default": "dflt dflted defaulted ausfall",
        "charged": "chg chgd charge",
        "balance": "bal saldo",
        "interest": "int zins",
        "transaction": "tx txn trx",
        "account": "acct acc konto",
        "product": "prod produkt",
        "location": "loc area ort",
        "document": "doc documentation",
        "retained": "ret retd retain",
        "created": "crt create crtd",
        "credit": "cred kredit line",
        "lender": "bank bnk",
        "outcome": "status result target label indicator",
    }.items()
    for own in others.split()
}
"""The word that stands for its common abbreviations and synonyms."""

_BAD: Final = _words(
    "bad default defaulted dflt chargedoff chargeoff chgoff loss npl fraud fraudulent nonperforming delinquent "
    "ausfall ausgefallen insolvent writtenoff writeoff"
)
_GOOD: Final = _words("good paid paidinfull pif repaid ok genuine legitimate nondefault notdefaulted bezahlt nofraud")
_TRUE: Final = _words("1 y yes true t j ja oui si")
_FALSE: Final = _words("0 n no false f nein non")
_DENIALS: Final = _words("not non no kein nicht")
_LEAST_PREFIX: Final = 3
_ALIKE: Final = 0.8


def plain_text(text: str) -> str:
    """Bring a text to lower case, without accents, umlauts written out: Größe is groesse."""
    lowered = unicodedata.normalize("NFC", text).lower().translate(_UMLAUTS)
    return "".join(sign for sign in unicodedata.normalize("NFKD", lowered) if not unicodedata.combining(sign))


def words_of(name: str) -> tuple[str, ...]:
    """Cut a name into words: annualIncome, ANNUAL_INCOME and "Annual income" are the same two."""
    spaced = re.sub(r"(?<=[a-zß-ÿ0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return tuple(re.findall(r"[a-z]+|[0-9]+", plain_text(spaced)))


def name_likeness(schema_name: str, own_name: str) -> float:
    """Tell from 0 to 1 how alike two names are: 1 the same, 0.97 the same but for case, separators and accents."""
    if schema_name == own_name:
        return 1.0
    wanted, own = words_of(schema_name), words_of(own_name)
    if wanted and "".join(wanted) == "".join(own):
        return 0.97
    if not wanted or not own:
        return 0.0
    wanted_words, own_words = _meant(wanted), _meant(own)
    if "".join(_kept(wanted)) == "".join(_kept(own)) or sorted(wanted_words) == sorted(own_words):
        return 0.94
    # Both ways: a word that the other lacks counts against the pair, whoever has it.
    forth, back = _share_of(wanted_words, own_words), _share_of(own_words, wanted_words)
    return 0.92 * 2 * forth * back / (forth + back) if forth + back else 0.0


def meanings(codes: tuple[str, ...], categories: tuple[str, ...]) -> dict[str, str]:
    """Tell which category each code spells; a code that spells none, or more than one, is left out.

    Taken for the same: what differs by case, separators, accents and a number before it ("01 - Car"); yes, Y, ja and
    1 where the categories are yes and no; and a beginning ("U" of urban) where each code left is of just one category
    left.
    """
    found: dict[str, str] = {}
    spelled: dict[str, set[str]] = {}
    for category in categories:
        for form in _forms(category) | _truth_forms(category, categories):
            spelled.setdefault(form, set()).add(category)
    for code in codes:
        meant = {code} & set(categories) or set[str]().union(
            *(spelled.get(form, set()) for form in _forms(code) | _truth_forms(code, categories))
        )
        if len(meant) == 1:
            found[code] = meant.pop()
    rest = tuple(code for code in codes if code not in found)
    return found | _by_beginning(rest, tuple(one for one in categories if one not in found.values()))


def polarity(text: str) -> Meaning | None:
    """Tell whether a word of a label means that the bad event happened, that it did not, or neither for sure."""
    words = words_of(text)
    joined = "".join(words)
    if joined in _GOOD or joined in _BAD:
        return "good" if joined in _GOOD else "bad"
    pairs = {*words, *(a + b for a, b in itertools.pairwise(words))}
    if denies(text):
        return None
    bad, good = bool(pairs & _BAD), bool(pairs & _GOOD)
    if bad == good:
        return None
    return "bad" if bad else "good"


def denies(text: str) -> bool:
    """Tell whether a name says that something is not so: a 1 in NOT_PAID, say, means the opposite of paid."""
    return not _DENIALS.isdisjoint(words_of(text))


def truth(text: str) -> bool | None:
    """Read yes, Y, true and 1 as true, their opposites as false, and anything else as neither."""
    form = plain_text(text).strip()
    return True if form in _TRUE else False if form in _FALSE else None


def _kept(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if word not in _NOISE) or words


def _meant(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_SAME.get(word, word) for word in _kept(words))


def _share_of(words: tuple[str, ...], others: tuple[str, ...]) -> float:
    """Tell how much of the words, by their length, the others have."""
    total = sum(len(word) for word in words)
    return sum(len(word) * max(_alike(word, other) for other in others) for word in words) / total


def _alike(word: str, other: str) -> float:
    if word == other:
        return 1.0
    short, long = sorted((word, other), key=len)
    if len(short) >= _LEAST_PREFIX and long.startswith(short):
        return 0.9
    ratio = SequenceMatcher(None, word, other, autojunk=False).ratio()
    return ratio if ratio >= _ALIKE else 0.0


def _forms(text: str) -> set[str]:
    joined = "".join(re.findall(r"[^\W_]+", plain_text(text)))
    without = "".join(re.findall(r"[^\W_]+", re.sub(r"^[\d\W_]+(?=[^\W\d_])", "", plain_text(text))))
    number = re.sub(r"^0+(?=\d)", "", joined) if joined.isdigit() else joined
    return {form for form in (joined, without, number) if form}


def _truth_forms(text: str, categories: tuple[str, ...]) -> set[str]:
    if not {True, False} <= {truth(category) for category in categories}:
        return set()
    read = truth(text)
    return set() if read is None else {f" {read}"}


def _by_beginning(codes: tuple[str, ...], categories: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for code in codes:
        form = plain_text(code).strip()
        meant = [one for one in categories if form.isalpha() and plain_text(one).startswith(form)]
        if len(meant) != 1 or meant[0] in found.values():
            return {}
        found[code] = meant[0]
    return found
