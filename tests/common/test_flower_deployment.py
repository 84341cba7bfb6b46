"""The contract with Flower's deployment engine: it fails where a newer Flower moves or alters what we lean on."""

import inspect
import time
from importlib.metadata import version
from typing import Any

import pytest
import uvicorn

from metarisk_common import flower_deployment
from server.hub import FLEET_PATHS


def flower(module: str) -> Any:
    return pytest.importorskip(module)


def test_the_version_is_the_one_that_was_studied() -> None:
    assert version("flwr") == "1.41.0"


def test_the_node_waits_with_the_two_pauses_that_patience_tells_apart() -> None:
    loop = flower("flwr.supernode.start_client_internal")
    assert loop.time is time
    source = inspect.getsource(loop)
    assert source.count("time.sleep(3)") == 1
    assert source.count("time.sleep(0.5)") == 2
    assert source.count("time.sleep(") == 3


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("flwr.supernode.start_client_internal", "pull_objects"),
        ("flwr.supernode.runtime.run_clientapp", "pull_and_inflate_object_from_tree"),
    ],
)
def test_what_is_not_there_yet_is_looked_for_again_after_a_pause_of_ours(module: str, name: str) -> None:
    """Each of them takes the first pause by name, is called without one, and found in its module when it is called."""
    loaded = flower(module)
    found = getattr(loaded, name)
    assert inspect.signature(found).parameters["initial_backoff"].default in {1, 0.05}
    assert "initial_backoff" not in inspect.getsource(loaded)
    assert f"{name}(" in inspect.getsource(loaded)


def test_the_hub_listens_by_way_of_uvicorn_run() -> None:
    source = inspect.getsource(flower("flwr.superlink.cli.flower_superlink")._run_superlink_http_api)
    assert source.count("uvicorn.run(") == 1
    given = {"app", "host", "port", "ssl_keyfile", "ssl_certfile"}
    assert given <= set(inspect.signature(uvicorn.run).parameters)


def test_the_outside_door_knows_every_path_of_the_fleet_but_enrolment() -> None:
    paths = {route.path for route in flower("flwr.superlink.routers.fleet.router").router.routes}
    assert paths - FLEET_PATHS == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert paths >= FLEET_PATHS


def test_a_key_is_asked_for_what_only_a_node_may_do() -> None:
    """Every request that the door lets through is authenticated, whatever its path: by prefix."""
    source = inspect.getsource(flower("flwr.superlink.routers.fleet.node_auth").NodeAuthMiddleware.dispatch)
    assert 'startswith("/v1/fleet/")' in source


@pytest.mark.parametrize("command", ["superlink", "supernode"])
def test_the_flags_that_are_given_exist(command: str) -> None:
    module, make = {
        "superlink": ("flwr.superlink.cli.flower_superlink", "_parse_args_run_superlink"),
        "supernode": ("flwr.supernode.cli.flower_supernode", "_parse_args_run_supernode"),
    }[command]
    known = {flag for action in getattr(flower(module), make)()._actions for flag in action.option_strings}
    wanted = {
        "superlink": {
            "--host", "--port", "--ssl-ca-certfile", "--ssl-certfile", "--ssl-keyfile", "--database",
            "--enable-supernode-auth", "--isolation", "--superexec-auth-secret-file",
            "--disable-runtime-dependency-installation",
        },
        "supernode": {
            "--superlink", "--root-certificates", "--auth-supernode-private-key", "--host", "--port", "--isolation",
            "--superexec-auth-secret-file",
        },
    }[command]  # fmt: skip
    assert wanted <= known


def test_what_is_offered_is_what_is_named() -> None:
    assert flower_deployment.__all__ == sorted(flower_deployment.__all__)
    assert all(hasattr(flower_deployment, name) for name in flower_deployment.__all__)
