"""Who may do what on the loopback Hub, and its branches, tags, pull requests and listings, as the client sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hub.clients import http, run_client
from hub.server import Blob, LoopbackHub, Repository

FILES = {"README.md": b"# Tiny", "unet/config.json": b"{}", "unet/deep/a.safetensors": b"weights"}


def fill(hub: LoopbackHub, **private: bool) -> None:
    """Put in a repository for each name, by hand."""
    blobs = {path: Blob(content, lfs=path.endswith(".safetensors")) for path, content in FILES.items()}
    hub.repositories.update({f"me/{name}": Repository(hidden, blobs) for name, hidden in private.items()})


ATTEMPTS = {
    "read public": "model_info('me/public').id",
    "download public": "open(hf_hub_download('me/public', 'README.md')).read()",
    "read private": "model_info('me/private').private",
    "download private": "open(hf_hub_download('me/private', 'README.md')).read()",
    "read missing": "model_info('me/missing')",
    "whoami": "[HfApi().whoami()['name'], HfApi().whoami()['auth']['accessToken']['role']]",
    "auth": "auth_check('me/public', write=True)",
    "create": "create_repo('me/new').repo_id",
    "upload": "upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id='me/public').pr_num",
    "branch": "create_branch('me/public', branch='b')",
    "tag": "create_tag('me/public', tag='t')",
    "delete": "delete_repo('me/private')",
}
ATTEMPT_ALL = """
results = {}
for name, call in json.loads(sys.argv[1]).items():
    try:
        results[name] = eval(call)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", "no status")
        results[name] = f"{type(error).__name__} {status}"
answer(results)
"""
HIDDEN = "RepositoryNotFoundError 401"
READS = {"read public": "me/public", "download public": "# Tiny"}
READS_ALL = {**READS, "read private": True, "download private": "# Tiny"}
MISSING = {"read missing": "RepositoryNotFoundError 404"}
WRITES = {"auth": None, "create": "me/new", "upload": None, "branch": None, "tag": None, "delete": None}
REFUSED = dict.fromkeys(WRITES, "HfHubHTTPError 403")
SEEN_BY: dict[str, dict[str, Any]] = {
    "write": {**READS_ALL, **MISSING, "whoami": ["me", "write"], **WRITES},
    "read": {**READS_ALL, **MISSING, "whoami": ["me", "read"], **REFUSED},
    "none": {
        **READS,
        **dict.fromkeys(("read private", "download private", "read missing"), HIDDEN),
        "whoami": "LocalTokenNotFoundError no status",
        **dict.fromkeys(WRITES, HIDDEN),
        # What the client makes of 401 depends on the address.
        "create": "HfHubHTTPError 401",
        "delete": "HfHubHTTPError 401",
    },
    "wrong": dict.fromkeys(ATTEMPTS, "HfHubHTTPError 401"),
}


@pytest.mark.parametrize("who", SEEN_BY)
def test_a_token_gives_its_rights_and_nothing_more(tmp_path: Path, who: str) -> None:
    token = {"write": "hf_loopback", "read": "hf_reader", "none": None, "wrong": "hf_wrong"}[who]
    with LoopbackHub() as hub:
        hub.tokens["hf_reader"] = "read"
        fill(hub, public=False, private=True)
        before = hub.repositories["me/public"].refs.copy()
        seen = run_client(hub.environment(tmp_path, token=token), ATTEMPT_ALL, json.dumps(ATTEMPTS))
    assert seen == SEEN_BY[who]
    changed = hub.repositories.keys() != {"me/public", "me/private"}, hub.repositories["me/public"].refs != before
    assert changed == (who == "write", who == "write")
    assert hub.leaked_tokens() == []
    sent = {call.headers.get("Authorization") for call in hub.calls if call.route != "agent_harnesses"}
    assert sent == {f"Bearer {token}" if token else None}


def test_a_token_out_of_its_place_is_found() -> None:
    with LoopbackHub() as hub:
        http(f"{hub.url}/api/models/hf_loopback/a")
        http(f"{hub.url}/api/models/me/a?token=hf_loopback")
        http(
            f"{hub.url}/api/models/me/a",
            None,
            "GET",
            **{"X-Note": "hf_loopback", "Authorization": "Bearer hf_loopback"},
        )
        http(f"{hub.url}/api/validate-yaml", b'{"content": "hf_loopback"}', "POST")
        http(f"{hub.url}/api/models/me/a", Authorization="Bearer hf_loopback")
        fill(hub, clean=False)
        hub.repositories["me/card"] = Repository(files={"README.md": Blob(b"my token is hf_loopback")})
    places = [leak.split(", ")[0] for leak in hub.leaked_tokens()]
    assert places == ["call 0", "call 1", "call 2", "call 3", "me/card"]


@pytest.mark.parametrize("wish", [{"visibility": "private"}, {"private": True}])
def test_clients_old_and_new_can_ask_for_a_private_repository(wish: dict[str, object]) -> None:
    with LoopbackHub() as hub:
        body = json.dumps({"name": "tiny", "organization": "me", **wish}).encode()
        assert http(f"{hub.url}/api/repos/create", body, "POST", Authorization="Bearer hf_loopback")[0] == 200
    assert hub.repositories["me/tiny"].private


def test_a_pull_request_is_a_revision_and_changes_no_branch(tmp_path: Path) -> None:
    script = """
    def add(name, **options):
        return upload_file(path_or_fileobj=name.encode(), path_in_repo=name, repo_id="me/tiny", **options)
    first = add("first.txt", create_pr=True, commit_description="Why.")
    second = add("second.safetensors", create_pr=True)
    amended = add("more.txt", revision=first.pr_revision)
    opened = create_pull_request("me/tiny", title="By hand")
    requests = list_repo_refs("me/tiny", include_pull_requests=True).pull_requests
    revisions = ("main", "refs/pr/1", "refs/pr/2", "refs/pr/3")
    answer({
        "numbers": [first.pr_num, second.pr_num, opened.num],
        "urls": [first.pr_url, second.pr_url, opened.url],
        "files": {rev: list_repo_files("me/tiny", revision=rev) for rev in revisions},
        "text": open(hf_hub_download("me/tiny", "first.txt", revision="refs/pr/1")).read(),
        "heads": [first.oid, amended.oid, second.oid],
        "refs": {ref.ref: ref.target_commit for ref in requests},
        "unasked": list_repo_refs("me/tiny").pull_requests,
        "title": get_discussion_details("me/tiny", 3).title,
    })
    """
    with LoopbackHub() as hub:
        fill(hub, tiny=False)
        before = hub.repositories["me/tiny"].refs["refs/heads/main"]
        seen = run_client(hub.environment(tmp_path), script)
    first, amended, second = seen["heads"]
    repository = hub.repositories["me/tiny"]
    assert repository.branches == {"main": before}
    assert repository.commits[first].parent == repository.commits[second].parent == before
    assert repository.commits[amended].parent == first
    assert seen["numbers"] == [1, 2, 3]
    assert seen["urls"] == [f"{hub.url}/me/tiny/discussions/{number}" for number in (1, 2, 3)]
    assert {revision: set(files) - FILES.keys() for revision, files in seen["files"].items()} == {
        "main": set(),
        "refs/pr/1": {"first.txt", "more.txt"},
        "refs/pr/2": {"second.safetensors"},
        "refs/pr/3": set(),
    }
    assert seen["text"] == "first.txt"
    assert seen["refs"] == {"refs/pr/1": amended, "refs/pr/2": second, "refs/pr/3": before}
    assert seen["unasked"] is None
    assert seen["title"] == "By hand"


def test_history_branches_and_tags(tmp_path: Path) -> None:
    script = """
    def add(name, **options):
        options |= {"repo_id": "me/tiny", "commit_message": name}
        return upload_file(path_or_fileobj=name.encode(), path_in_repo=name, **options).oid
    def refs():
        refs = list_repo_refs("me/tiny")
        return {ref.ref: ref.target_commit for ref in (*refs.branches, *refs.tags)}
    one, two = add("one"), add("two", commit_description="A second file.")
    create_tag("me/tiny", tag="v1/rc", revision=one)
    create_branch("me/tiny", branch="side/way")
    three = add("three", revision="side/way")
    delete_folder("unet", "me/tiny", commit_message="tidy")
    before = refs()
    delete_branch("me/tiny", branch="side/way")
    delete_tag("me/tiny", tag="v1/rc")
    log = list_repo_commits("me/tiny", revision=three)
    answer({
        "oids": [one, two, three],
        "before": before,
        "after": refs(),
        "log": [[commit.commit_id, commit.title, commit.message] for commit in log],
        "main": [commit.title for commit in list_repo_commits("me/tiny")],
        "files": list_repo_files("me/tiny"),
        "exist": [repo_exists("me/tiny"), revision_exists("me/tiny", "side/way"), file_exists("me/tiny", "one")],
        "deleted": [delete_repo("me/tiny"), repo_exists("me/tiny"), delete_repo("me/tiny", missing_ok=True)],
    })
    """
    with LoopbackHub() as hub:
        fill(hub, tiny=False)
        repository = hub.repositories["me/tiny"]
        initial = repository.branches["main"]
        seen = run_client(hub.environment(tmp_path), script)
    one, two, three = seen["oids"]
    main = repository.branches["main"]
    assert seen["before"] == {"refs/heads/main": main, "refs/heads/side/way": three, "refs/tags/v1/rc": one}
    assert seen["after"] == {"refs/heads/main": main}
    first_three = [[three, "three", ""], [two, "two", "A second file."], [one, "one", ""]]
    assert seen["log"] == [*first_three, [initial, "initial commit", ""]]
    assert seen["main"] == ["tidy", "two", "one", "initial commit"]
    assert seen["files"] == ["README.md", "one", "two"]
    assert seen["exist"] == [True, False, True]
    assert seen["deleted"] == [None, False, None]
    assert hub.repositories == {}


def test_listings_of_folders_and_of_single_paths(tmp_path: Path) -> None:
    script = """
    def describe(entries):
        return [[entry.path, getattr(entry, "size", None), bool(getattr(entry, "lfs", None))] for entry in entries]
    answer({
        "root": describe(list_repo_tree("me/tiny")),
        "folder": describe(list_repo_tree("me/tiny", "unet")),
        "deep folder": describe(list_repo_tree("me/tiny", "unet/deep")),
        "all": describe(list_repo_tree("me/tiny", recursive=True)),
        "all below": describe(list_repo_tree("me/tiny", "unet", recursive=True)),
        "paths": describe(get_paths_info("me/tiny", ["unet", "README.md", "missing", "unet/deep/a.safetensors"])),
    })
    """
    with LoopbackHub() as hub:
        fill(hub, tiny=False)
        seen = run_client(hub.environment(tmp_path), script)
    card, folder, config = ["README.md", 6, False], ["unet", None, False], ["unet/config.json", 2, False]
    deep, weights = ["unet/deep", None, False], ["unet/deep/a.safetensors", 7, True]
    assert seen == {
        "root": [card, folder],
        "folder": [config, deep],
        "deep folder": [weights],
        "all": [card, folder, config, deep, weights],
        "all below": [config, deep, weights],
        "paths": [folder, card, weights],
    }


@pytest.mark.parametrize("path", ["../a", "/a", "a/../../b", "", "a/.."])
def test_no_path_leaves_its_repository(path: str) -> None:
    operation = {"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "s"}}, operation])).encode()
    with LoopbackHub() as hub:
        fill(hub, tiny=False)
        status, answer, _ = http(
            f"{hub.url}/api/models/me/tiny/commit/main", body, "POST", Authorization="Bearer hf_loopback"
        )
    assert (status, "no path within" in answer.decode()) == (400, True)
    assert len(hub.repositories["me/tiny"].commits) == 1


@pytest.mark.parametrize("card", [b"---\ntags: [\n---\n", b"---\n- a list\n---\n", b"\xff\xfe"])
def test_a_card_without_readable_metadata_hides_no_repository(card: bytes) -> None:
    with LoopbackHub() as hub:
        hub.repositories["me/odd"] = Repository(files={"README.md": Blob(card)})
        status, answer, _ = http(f"{hub.url}/api/models/me/odd")
    assert (status, json.loads(answer)["cardData"]) == (200, {})
