"""A bank without records: one light process that speaks with the hub as a node does, and answers as a bank would.

What it sends is noise of the plan's size. So twenty of them fit on a small machine, and a server that is tried with
them cannot tell them from banks. Run as `light_bank.py HOST:PORT CA KEY NAME PLAN`.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.supercore.inflatable import inflatable_object as trees
from flwr.supercore.inflatable import inflatable_utils as pieces
from flwr.supernode.fleet_http_connection import http_request_response

from metarisk_common.flower_compat import identify_process
from metarisk_common.plan import Plan, read_plan
from metarisk_common.wire import TrainReport, decode_order, encode_reply

SIZE = 1000


def answer(message: Message, name: str, plan: Plan, counter: int) -> Message:
    """Answer an order with a report of noise."""
    order = decode_order(message.content)
    random = np.random.default_rng(counter)
    update = {key: random.normal(0, 0.01, value.shape).astype(value.dtype) for key, value in order.meta_params.items()}
    report = TrainReport(
        order.run_id, order.round, order.plan_hash, name, SIZE, plan.train_event(), f"{name}-{counter}", counter, update
    )
    return Message(encode_reply(report), reply_to=message)


def serve(address: str, ca: str, key: Any, name: str, plan: Plan) -> None:
    """Answer every order until the process is ended."""
    keys = (key, key.public_key())
    with http_request_response(address, insecure=False, root_certificates=ca, authentication_keys=keys) as hub:
        node, receive, send, _, _, pull, push, confirm = hub
        counter = 0
        while True:
            found = receive()
            if found is None:
                time.sleep(0.5)
                continue
            head, tree = found
            run, message_id = head.metadata.run_id, head.metadata.message_id
            identify_process(run, node)
            names = [piece.object_id for piece in trees.iterate_object_tree(tree)]
            content = pieces.pull_objects(names, lambda name, run=run: pull(run, name), initial_backoff=0.1)  # type: ignore[misc]
            confirm(run, message_id)
            message: Any = pieces.inflate_object_from_contents(message_id, content)
            message.metadata.__dict__["_message_id"] = message_id
            counter += 1
            reply = answer(message, name, plan, counter)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            with trees.no_object_id_recompute():
                wanted, session = send(reply, trees.get_object_tree(reply), 0.1)
                for piece, item in trees.get_all_nested_objects(reply).items():
                    if piece in wanted:
                        push(run, session, piece, item.deflate())


if __name__ == "__main__":
    place, authority, private, bank, approved = sys.argv[1:]
    serve(place, authority, load_ssh_private_key(Path(private).read_bytes(), None), bank, read_plan(Path(approved)))
