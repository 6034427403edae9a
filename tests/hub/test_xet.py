"""Upload and download by Xet, as the stock client does it where nobody forbids it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub.clients import read_files, run_client, write_files
from hub.server import LoopbackHub

pytest.importorskip("hf_xet")

FOLDER = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4000, "copy/model.safetensors": b"\0\xff" * 9}
PUBLISH = """
create_repo("me/tiny", exist_ok=True)
answer(upload_folder(repo_id="me/tiny", folder_path=sys.argv[1]).oid)
"""
PUBLISH_IN_ONE_COMMIT = """
from pathlib import Path
create_repo("me/tiny", exist_ok=True)
paths = [path for path in Path(sys.argv[1]).rglob("*") if path.is_file()]
operations = [CommitOperationAdd(path.relative_to(sys.argv[1]).as_posix(), path) for path in paths]
commit = create_commit("me/tiny", operations, commit_message="Upload", create_pr="pr" in sys.argv[2:])
answer(commit.oid)
"""
DOWNLOAD = "answer(snapshot_download('me/tiny', revision=sys.argv[1]))"


@pytest.mark.slow
@pytest.mark.parametrize("publish", [[PUBLISH], [PUBLISH_IN_ONE_COMMIT], [PUBLISH_IN_ONE_COMMIT, "pr"]])
def test_what_is_uploaded_by_xet_is_what_is_downloaded(tmp_path: Path, publish: list[str]) -> None:
    script, *options = publish
    folder = write_files(tmp_path / "folder", FOLDER)
    with LoopbackHub(xet_folder=tmp_path / "xet") as hub:
        oid = run_client(hub.environment(tmp_path / "publisher", xet=True), script, folder, *options)
        uploaded = len(hub.calls)
        by_xet = run_client(hub.environment(tmp_path / "reader", xet=True), DOWNLOAD, oid)
        downloaded = len(hub.calls)
        by_http = run_client(hub.environment(tmp_path / "plain reader"), DOWNLOAD, oid)
    assert read_files(Path(by_xet)) == read_files(Path(by_http)) == FOLDER
    files = hub.repositories["me/tiny"].commits[oid].files
    assert {path for path, blob in files.items() if blob.xet_hash} == {p for p in FOLDER if p.endswith("safetensors")}

    routes = [call.route for call in hub.calls]
    assert "xet_write_token" in routes[:uploaded]
    assert "lfs_batch" not in routes
    over_http = [
        {call.path.split("/", 5)[-1] for call in calls if call.route == "resolve" and call.method == "GET"}
        for calls in (hub.calls[uploaded:downloaded], hub.calls[downloaded:])
    ]
    assert {name for name in FOLDER if any(path.endswith(name) for path in over_http[1])} == FOLDER.keys()
    assert "xet_read_token" in routes[uploaded:downloaded]
    assert not any(path.endswith("safetensors") for path in over_http[0]), "they came out of the store"
    assert hub.leaked_tokens() == []


@pytest.mark.slow
def test_a_commit_names_no_file_that_the_store_does_not_hold(tmp_path: Path) -> None:
    """A client that skips the upload gets an error, and no commit."""
    script = """
    create_repo("me/tiny")
    operation = CommitOperationAdd("a.safetensors", b"never stored")
    operation._is_uploaded, operation._upload_mode = True, "lfs"
    try:
        create_commit("me/tiny", [operation], commit_message="Upload")
    except Exception as error:
        answer(str(error))
    """
    with LoopbackHub(xet_folder=tmp_path / "xet") as hub:
        error = run_client(hub.environment(tmp_path / "publisher", xet=True), script)
    assert "there is no LFS object" in error
    assert len(hub.repositories["me/tiny"].commits) == 1
