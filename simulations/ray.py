"""The same apps on Flower's own simulation engine, which runs every bank's app in Ray actors."""

from collections.abc import Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from metarisk_common.errors import ConfigError
from metarisk_common.flower_compat import run_on_ray

from .inprocess import Node, load_app


def run_apps_on_ray(
    server_app: ServerApp, client_app: str, nodes: Sequence[Node], *, workers: int, run_config: dict[str, Any]
) -> None:
    """Run a ServerApp with one virtual node a bank.

    Flower gives its virtual nodes a number and no configuration, so a thin app in front looks the bank up by
    that number and hands the message on, unchanged, to the production app.

    Raises:
        ConfigError: the extra `ray` is not installed.

    """
    configs = [dict(node.config) for node in nodes]
    front = ClientApp()

    @front.train()
    def train(message: Message, context: Context) -> Message:
        config = {**context.node_config, **configs[int(context.node_config["partition-id"])]}
        inner = Context(context.run_id, context.node_id, config, context.state, context.run_config)
        return load_app(client_app)(message, inner)

    try:
        run_on_ray(server_app, front, nodes=len(nodes), run_config=run_config, workers=max(1, workers))
    except ImportError:
        message = "--engine ray needs the extra: pip install 'metarisk-federated[ray]'"
        raise ConfigError(message) from None
