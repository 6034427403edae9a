"""The client process that the other tests of the Hub run their scripts in."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hub.clients import Client


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(os.environ) as client:
        yield client


def test_a_script_has_its_arguments_and_gives_its_last_answer(client: Client) -> None:
    assert client.run("answer(1); answer(sys.argv[1:])", "a", 2) == ["a", "2"]
    assert client.run("answer(sys.argv[1:])") == []
    assert client.run("pass") is None


def test_scripts_share_a_process_and_no_names(client: Client) -> None:
    first = client.run("import os\nname = 1\nanswer(os.getpid())")
    assert first == client.run("import os\nanswer(os.getpid())") != os.getpid()
    assert client.run("answer('name' in globals())") is False


def test_what_is_printed_is_kept_and_is_no_answer(client: Client) -> None:
    client.run("import os\nprint('from Python')\nos.system('echo from below')\nanswer(0)")
    assert "from Python" in client.printed()
    assert "from below" in client.printed()


@pytest.mark.parametrize("script", ["raise KeyError('lost')", "sys.exit('lost')"])
def test_an_exception_comes_with_its_traceback_and_the_client_goes_on(client: Client, script: str) -> None:
    with pytest.raises(AssertionError, match=r"Traceback[\s\S]*lost"):
        client.run(script)
    assert client.run("answer('still here')") == "still here"


def test_a_client_that_dies_or_takes_too_long_is_reported() -> None:
    with Client(os.environ) as client, pytest.raises(AssertionError, match="The client died"):
        client.run("import os\nos._exit(1)")
    with Client(os.environ) as client:
        for _ in range(2):
            with pytest.raises(AssertionError, match="The client died"):
                client.run("import time\ntime.sleep(600)", timeout=0.5)
