"""Recipes: from a CSV file of a wheel to the tidy table that a scenario reads. Pure functions of the file.

Nothing is dropped in silence: what a recipe leaves out is counted, and the counts go to the user and the receipt.
Rules that make institutions are public: they look at names, row numbers and counts, never at a label; but that of the
SBA's lenders, whose records are all public, those are left out that have next to no record of one of the outcomes.
"""

from pathlib import Path
from typing import Final

import polars as pl

from .fetch import Tidied

SBA_YEARS: Final = (1990, 2010)
SBA_LEAST_LOANS: Final = 300
SBA_LEAST_OUTCOMES: Final = 10
IEEE_LEAST_ROWS: Final = 400
PAKDD_LEAST_ROWS: Final = 300
GIVE_ME_GROUPS: Final = 21
"""Twenty institutions, and one group of rows that only shaped the scenario's public constants."""
_SECTORS: Final = {
    "11": "agriculture", "21": "mining", "22": "utilities", "23": "construction", "31": "manufacturing",
    "32": "manufacturing", "33": "manufacturing", "42": "wholesale", "44": "retail", "45": "retail",
    "48": "transport", "49": "transport", "51": "information", "52": "finance", "53": "real_estate",
    "54": "professional", "55": "management", "56": "administrative", "61": "education", "62": "health",
    "71": "arts", "72": "hospitality", "81": "other_services", "92": "public_administration",
}  # fmt: skip


def sba(path: Path) -> Tidied:
    """Make the table of all lenders, with the columns that `data/sba_loans.parquet` has.

    Kept are loans with an outcome and a known sector, of fiscal years 1990 to 2010, of lenders with 300 such loans.
    The loan's term gives its outcome away and is not a column; names and places below the state are not, either.
    """
    raw = pl.read_csv(path, infer_schema=False)
    kept, left_out = _without(
        raw.with_columns(
            year=pl.col("ApprovalFY").cast(pl.Int16, strict=False),
            sector=pl.col("NAICS").str.slice(0, 2).replace_strict(_SECTORS, default=None),
        ),
        {
            "without an outcome": pl.col("MIS_Status").is_in(["P I F", "CHGOFF"]).not_().fill_null(value=True),
            "without a lender's name": pl.col("Bank").is_null(),
            "not of fiscal years 1990 to 2010": pl.col("year").is_between(*SBA_YEARS).not_().fill_null(value=True),
            "without a known sector": pl.col("sector").is_null(),
        },
    )
    table = kept.select(
        bank="Bank",
        state="State",
        sector="sector",
        approval_year="year",
        employees=_whole("NoEmp"),
        business_age=_named("NewExist", {"1": "existing", "2": "new"}),
        jobs_created=_whole("CreateJob"),
        jobs_retained=_whole("RetainedJob"),
        location=_named("UrbanRural", {"1": "urban", "2": "rural"}),
        revolving_credit=_named("RevLineCr", {"N": "no", "Y": "yes"}),
        low_doc=_named("LowDoc", {"N": "no", "Y": "yes"}),
        franchise=pl.when(pl.col("FranchiseCode").is_in(["0", "1"])).then(pl.lit("no")).otherwise(pl.lit("yes")),
        lender_in_state=pl.when(pl.col("BankState") == pl.col("State")).then(pl.lit("yes")).otherwise(pl.lit("no")),
        approved_amount=_dollars("GrAppv"),
        guaranteed_amount=_dollars("SBA_Appv"),
        charged_off=(pl.col("MIS_Status") == "CHGOFF").cast(pl.Int8),
    )
    found = _with_enough(table, "bank", SBA_LEAST_LOANS, raw.height, left_out)
    rarer = pl.min_horizontal(pl.col("charged_off").sum(), (1 - pl.col("charged_off")).sum())
    kept = found.table.filter(rarer.over("bank") >= SBA_LEAST_OUTCOMES)
    counts = {
        f"lenders of fewer than {SBA_LEAST_OUTCOMES} loans of an outcome, left out": found.table["bank"].n_unique()
        - kept["bank"].n_unique(),
        "rows of those lenders": found.table.height - kept.height,
    }
    after = {"institutions": kept["bank"].n_unique(), "rows": kept.height}
    before = {name: count for name, count in found.counts.items() if name not in after}
    return Tidied(kept, before | counts | after)


def ieee_cis(path: Path) -> Tidied:
    """Make the table of card payments: an institution for each value of `card5` with 400 rows or more.

    Kept are the columns that this copy has little missing of; the others, and every card number, address and device,
    are not read.
    """
    numbers = ("TransactionAmt", "card3", *(f"C{n}" for n in range(1, 15)))
    numbers += tuple(f"V{n}" for n in (13, 15, 17, 95, 97, 99, 101, 126, 127, 279, 280, 285, 294, 302, 306, 307, 308))
    numbers += ("V310", "V312", "V313", "V317", "id_13", "id_17", "id_19", "id_20")
    texts = ("ProductCD", "R_emaildomain", "id_16")
    wanted = ["TransactionID", "TransactionDT", "isFraud", "card5", *numbers, *texts]
    raw = pl.read_csv(path, columns=wanted, infer_schema_length=0)
    kept, left_out = _without(raw, {"without card5": pl.col("card5").is_null()})
    mail = pl.col("R_emaildomain").str.split(".").list.first().fill_null("none")
    table = kept.select(
        *(pl.col(name).cast(pl.Float64) for name in numbers),
        institution=pl.format("card5-{}", pl.col("card5").cast(pl.Float64).cast(pl.Int64)),
        transaction=pl.col("TransactionID").cast(pl.Int64),
        day=(pl.col("TransactionDT").cast(pl.Float64) // 86_400).cast(pl.Int32),
        hour=(pl.col("TransactionDT").cast(pl.Float64) // 3600 % 24).cast(pl.Int32),
        product="ProductCD",
        receiver_mail=mail,
        id_16=pl.col("id_16").fill_null("none"),
        is_fraud=pl.col("isFraud").cast(pl.Float64).cast(pl.Int8),
    )
    return _with_enough(table, "institution", IEEE_LEAST_ROWS, raw.height, left_out)


def give_me_some_credit(path: Path) -> Tidied:
    """Make the table of borrowers, dealt to 20 institutions by their row numbers: alike, but for chance.

    Row r goes to group (r times 2654435761 modulo 2^32) modulo 21, a multiplicative hash (Knuth, The Art of Computer
    Programming 3, section 6.4); group 20 takes no part, for the scenario's constants were counted on it.
    """
    raw = pl.read_csv(path, infer_schema=False)
    names = {
        "RevolvingUtilizationOfUnsecuredLines": "utilisation",
        "age": "age",
        "NumberOfTime30-59DaysPastDueNotWorse": "late_30_days",
        "NumberOfTime60-89DaysPastDueNotWorse": "late_60_days",
        "NumberOfTimes90DaysLate": "late_90_days",
        "DebtRatio": "debt_ratio",
        "MonthlyIncome": "monthly_income",
        "NumberOfOpenCreditLinesAndLoans": "open_credits",
        "NumberRealEstateLoansOrLines": "real_estate_loans",
        "NumberOfDependents": "dependents",
    }
    numbers = [pl.col(old).replace("NA", None).cast(pl.Float64).alias(new) for old, new in names.items()]
    group = (pl.col("id").cast(pl.UInt64) * 2_654_435_761 % 2**32 % GIVE_ME_GROUPS).cast(pl.Int64)
    kept, left_out = _without(
        raw.with_columns(group=group),
        {"kept apart for the public constants": pl.col("group") == GIVE_ME_GROUPS - 1},
    )
    table = kept.select(
        pl.format("group-{}", pl.col("group").cast(pl.String).str.zfill(2)).alias("institution"),
        *numbers,
        pl.col("SeriousDlqin2yrs").cast(pl.Int8).alias("defaulted"),
    )
    return _with_enough(table, "institution", 1, raw.height, left_out)


def pakdd(path: Path) -> Tidied:
    """Make the table of a retailer's card applicants, with an institution for each shop of 300 applicants or more."""
    raw = pl.read_csv(path, separator="\t", infer_schema=False)
    kept, left_out = _without(
        raw, {"with cells in other columns": pl.col("TARGET_LABEL_BAD=1").is_in(["0", "1"]).not_()}
    )
    table = kept.select(
        institution=pl.format("shop-{}", pl.col("ID_SHOP").str.zfill(3)),
        age=pl.col("AGE").cast(pl.Float64),
        months_in_residence=pl.col("MONTHS_IN_RESIDENCE").cast(pl.Float64),
        months_in_job=pl.col("MONTHS_IN_THE_JOB").cast(pl.Float64),
        net_income=pl.col("PERSONAL_NET_INCOME").cast(pl.Float64),
        mate_income=pl.col("MATE_INCOME").cast(pl.Float64),
        sex="SEX",
        marital_status="MARITAL_STATUS",
        residence="RESIDENCE_TYPE",
        residential_phone="FLAG_RESIDENCIAL_PHONE",
        payment_day="PAYMENT_DAY",
        works_in_town="FLAG_RESIDENCE_TOWN_eq_WORKING_TOWN",
        works_in_state="FLAG_RESIDENCE_STATE_eq_WORKING_STATE",
        extra_cards="QUANT_ADDITIONAL_CARDS_IN_THE_APPLICATION",
        mothers_name="FLAG_MOTHERS_NAME",
        fathers_name="FLAG_FATHERS_NAME",
        defaulted=pl.col("TARGET_LABEL_BAD=1").cast(pl.Int8),
    )
    return _with_enough(table, "institution", PAKDD_LEAST_ROWS, raw.height, left_out)


def _without(raw: pl.DataFrame, reasons: dict[str, pl.Expr]) -> tuple[pl.DataFrame, dict[str, int]]:
    """Leave rows out for each reason in turn, and count them under the first that holds."""
    counts, kept = {}, raw
    for reason, expression in reasons.items():
        smaller = kept.filter(expression.not_())
        counts[f"rows {reason}"] = kept.height - smaller.height
        kept = smaller
    return kept, counts


def _with_enough(table: pl.DataFrame, by: str, least: int, read: int, left_out: dict[str, int]) -> Tidied:
    """Keep institutions of `least` rows or more, ordered by name; count the rest."""
    kept = table.filter(pl.len().over(by) >= least).sort(by, maintain_order=True)
    before, after = table[by].n_unique(), kept[by].n_unique()
    counts = {"rows read": read, **left_out}
    if least > 1:
        counts[f"institutions of fewer than {least} rows, left out"] = before - after
        counts["rows of those institutions"] = table.height - kept.height
    return Tidied(kept, {**counts, "institutions": after, "rows": kept.height})


def _whole(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int32)


def _dollars(name: str) -> pl.Expr:
    return pl.col(name).str.replace_all(r"[$, ]", "").cast(pl.Float64).cast(pl.Int64)


def _named(name: str, names: dict[str, str]) -> pl.Expr:
    return pl.col(name).replace_strict(names, default="unknown")
