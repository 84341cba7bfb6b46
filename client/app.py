"""The Flower ClientApp: finds the bank's folder and lets the bank answer."""

import logging
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from metarisk_common.errors import ConfigError, MetariskError

from .bank import Bank

FOLDER_KEY = "metarisk-institution"
SIMULATION_KEY = "metarisk-simulation"

# Two threads make products of this size slower, and a spinning second thread much slower still.
torch.set_num_threads(1)

log = logging.getLogger("metarisk.client")

app = ClientApp()

_banks: dict[Path, Bank] = {}


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer an order; the folder comes from the node's own configuration, never from the server's."""
    return _answer(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answer an order for score histograms."""
    return _answer(message, context)


def _answer(message: Message, context: Context) -> Message:
    folder, simulation = folder_of(context), context.node_config.get(SIMULATION_KEY) == "yes"
    try:
        bank = open_bank(folder, simulation=simulation)
    except Exception as error:
        if simulation:
            raise  # The person at the simulation is the bank's own.
        reason = str(error) if isinstance(error, MetariskError) else type(error).__name__
        log.error("the bank cannot be opened: %s", reason)  # noqa: TRY400 - the text says it all
        # Flower sends the text of an exception to the server: only a constant may leave the bank.
        raise MetariskError("the bank cannot answer") from None
    return Message(bank.answer(message.content), reply_to=message)


def folder_of(context: Context) -> Path:
    """Read the bank's folder from `metarisk-institution` in the node's configuration.

    Raises:
        ConfigError: the node was started without it.

    """
    folder = context.node_config.get(FOLDER_KEY)
    if not isinstance(folder, str):
        raise ConfigError(f"start the node with {FOLDER_KEY}=FOLDER in its node configuration")
    return Path(folder)


def open_bank(folder: Path, *, simulation: bool = False) -> Bank:
    """Return the open bank of a folder; it stays open for the life of this process.

    Whether it is a simulation says the node's own configuration: `metarisk-simulation=yes` lets a bank's noise be
    seeded, and stands in no configuration but that of `metarisk-simulate`'s own nodes.
    """
    path = folder.resolve()
    if path not in _banks:
        _banks[path] = Bank(path, simulation=simulation)
    return _banks[path]


def close_banks() -> None:
    """Close every bank that this process has open."""
    while _banks:
        _banks.popitem()[1].close()
