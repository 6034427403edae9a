"""The loopback Hub, as the unmodified client sees it: each test runs the client in a process of its own."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import urllib.error
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from hub.clients import http, read_files, run_client, write_files
from hub.server import LoopbackHub

REGULAR_FILES = {
    "README.md": b"---\nlibrary_name: diffusers\ntags: [vdm, tiny]\n---\n# Tiny\n",
    "unet/config.json": b'{"sample_size": 8}\n',
    "images/every byte.bin": bytes(range(256)) * 40,
    "empty.txt": b"",
}
LFS_FILES = {"unet/model.safetensors": bytes(range(255, -1, -1)) * 800, "copy.safetensors": b"\0\r\n\xff" * 999}


PUBLISH = """
create_repo("me/tiny", exist_ok=True)
answer(upload_folder(repo_id="me/tiny", folder_path=sys.argv[1], commit_message="Upload").oid)
"""
DOWNLOAD = "answer(snapshot_download('me/tiny', revision=sys.argv[1]))"


@pytest.mark.parametrize("upload", ["lfs", "base64", "base64, Xet switched on"])
def test_what_is_uploaded_is_what_is_downloaded(tmp_path: Path, upload: str) -> None:
    folder = write_files(tmp_path / "folder", REGULAR_FILES | LFS_FILES)
    with LoopbackHub(lfs_suffixes=(".safetensors",) if upload == "lfs" else ()) as hub:
        publisher, reader = (
            hub.environment(tmp_path / "publisher", xet="Xet" in upload),
            hub.environment(tmp_path / "reader"),
        )
        oid = run_client(publisher, PUBLISH, folder)
        snapshot = Path(run_client(reader, DOWNLOAD, "main"))
    assert read_files(snapshot) == REGULAR_FILES | LFS_FILES
    assert snapshot.name == oid
    stored_by_lfs = {path for path, blob in hub.repositories["me/tiny"].commits[oid].files.items() if blob.lfs}
    assert stored_by_lfs == (set(LFS_FILES) if upload == "lfs" else set())
    assert [call.route for call in hub.calls].count("lfs_upload") == len(stored_by_lfs)


def test_a_second_commit_moves_main_and_leaves_the_first_in_place(tmp_path: Path) -> None:
    first_files, second_files = {"a.txt": b"one"} | LFS_FILES, {"a.txt": b"two", "b.txt": b"new"} | LFS_FILES
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "cache")
        first = run_client(environment, PUBLISH, write_files(tmp_path / "first", first_files))
        second = run_client(environment, PUBLISH, write_files(tmp_path / "second", second_files))
        assert run_client(environment, PUBLISH, tmp_path / "second") == second, "nothing new: no new commit"
        assert read_files(Path(run_client(environment, DOWNLOAD, "main"))) == second_files
        assert read_files(Path(run_client(environment, DOWNLOAD, first))) == first_files
        assert run_client(environment, "answer(list_repo_refs('me/tiny').branches[0].target_commit)") == second
    repository = hub.repositories["me/tiny"]
    initial = repository.commits[first].parent
    assert initial is not None and repository.commits[initial].parent is None
    assert repository.commits[second].parent == first
    uploads = [call.path for call in hub.calls if call.route == "lfs_upload"]
    assert len(uploads) == len(LFS_FILES), "unchanged files must not travel twice"


def test_a_branch_is_a_revision_of_its_own(tmp_path: Path) -> None:
    script = """
    create_repo("tiny")
    first = upload_file(repo_id="me/tiny", path_in_repo="a.txt", path_or_fileobj=b"one").oid
    create_branch("me/tiny", branch="feature/x")
    create_branch("me/tiny", branch="old", revision=first)
    upload_file(repo_id="me/tiny", path_in_repo="a.txt", path_or_fileobj=b"two", revision="feature/x")
    delete_file("a.txt", "me/tiny", revision="old")
    answer({name: list_repo_files("me/tiny", revision=name) for name in ("main", "feature/x", "old")}
           | {"text": open(hf_hub_download("me/tiny", "a.txt", revision="feature/x")).read()})
    """
    with LoopbackHub() as hub:
        files = run_client(hub.environment(tmp_path), script)
    both = [".gitattributes", "a.txt"]
    assert files == {"main": both, "feature/x": both, "old": [".gitattributes"], "text": "two"}


def test_listings_describe_the_files(tmp_path: Path) -> None:
    script = """
    info = model_info("me/tiny", files_metadata=True)
    tree = [file for file in list_repo_tree("me/tiny", recursive=True) if hasattr(file, "blob_id")]
    answer({
        "info": [info.id, info.sha, info.tags, info.library_name, info.private],
        "siblings": {s.rfilename: [s.size, s.blob_id, s.lfs and s.lfs.sha256] for s in info.siblings},
        "tree": {f.path: [f.size, f.blob_id, f.lfs and f.lfs.sha256] for f in tree},
    })
    """
    folder = write_files(tmp_path / "folder", REGULAR_FILES | LFS_FILES)
    with LoopbackHub() as hub:
        oid = run_client(hub.environment(tmp_path), PUBLISH, folder)
        listing = run_client(hub.environment(tmp_path), script)
    assert listing["info"] == ["me/tiny", oid, ["vdm", "tiny"], "diffusers", False]
    assert listing["siblings"] == listing["tree"]
    git_oid = subprocess.run(["git", "hash-object", folder / "empty.txt"], capture_output=True, text=True, check=True)
    assert listing["tree"]["empty.txt"] == [0, git_oid.stdout.strip(), None]
    assert {path for path, (_, _, sha256) in listing["tree"].items() if sha256} == set(LFS_FILES)


UPLOAD = "upload_file(path_or_fileobj=b'text', path_in_repo='a.txt', repo_id="
REFUSED = {
    "hf_hub_download('me/tiny', 'missing.txt')": "RemoteEntryNotFoundError",
    "hf_hub_download('me/missing', 'a.txt')": "RepositoryNotFoundError",
    "hf_hub_download('me/tiny', 'a.txt', revision='missing')": "RevisionNotFoundError",
    "snapshot_download('me/missing')": "RepositoryNotFoundError",
    "snapshot_download('me/tiny', revision='missing')": "RevisionNotFoundError",
    "model_info('me/missing')": "RepositoryNotFoundError",
    UPLOAD + "'me/missing')": "RepositoryNotFoundError",
    UPLOAD + "'me/tiny', revision='missing')": "RevisionNotFoundError",
    UPLOAD + "'me/tiny', parent_commit='0' * 40)": "A commit has happened since",
    "HfApi()._validate_yaml('---\\ntags: [\\n---')": "Invalid metadata in README.md",
    "create_repo('me/tiny')": "You already created this model repo",
    "create_branch('me/tiny', branch='main')": "Reference already exists",
    "delete_branch('me/tiny', branch='main')": "403 Forbidden",
    "delete_branch('me/tiny', branch='missing')": "RevisionNotFoundError",
    "delete_tag('me/tiny', tag='missing')": "RevisionNotFoundError",
    "delete_file('missing.txt', 'me/tiny')": "A file with this name doesn't exist",
    "list(list_repo_tree('me/tiny', 'missing'))": "RemoteEntryNotFoundError",
    "list_repo_commits('me/tiny', revision='missing')": "RevisionNotFoundError",
    "get_discussion_details('me/tiny', 1)": "There is no pull request 1",
    "delete_repo('me/missing')": "RepositoryNotFoundError",
    "list(list_repo_likers('me/tiny'))": "501 Not Implemented",
}
TRY_ALL = """
create_repo("me/tiny")
errors = {}
for call in json.loads(sys.argv[1]):
    try:
        eval(call)
    except Exception as error:
        errors[call] = f"{type(error).__mro__} {error}"
answer(errors)
"""


def test_errors_are_the_clients_own(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        errors = run_client(hub.environment(tmp_path), TRY_ALL, json.dumps(list(REFUSED)))
    assert errors.keys() == REFUSED.keys()
    assert {call: error for call, error in REFUSED.items() if error not in errors[call]} == {}, errors
    assert len(hub.repositories["me/tiny"].commits) == 1, "a refused call must leave no commit"


def test_a_range_is_that_part_of_the_file(tmp_path: Path) -> None:
    content = LFS_FILES["unet/model.safetensors"]
    with LoopbackHub() as hub:
        run_client(hub.environment(tmp_path), PUBLISH, write_files(tmp_path / "folder", LFS_FILES))
        url = f"{hub.url}/me/tiny/resolve/main/unet/model.safetensors"
        assert http(url, Range="bytes=5-9")[:2] == (206, content[5:10])
        assert http(url, Range=f"bytes={len(content) - 7}-")[:2] == (206, content[-7:])
        assert http(url, Range="bytes=5-9")[2]["Content-Range"] == f"bytes 5-9/{len(content)}"
        assert http(url, Range=f"bytes={len(content)}-")[0] == 416
        status, body, headers = http(url, method="HEAD")
    assert (status, body, headers["X-Linked-Size"]) == (200, b"", str(len(content)))


def test_an_lfs_upload_is_held_to_its_digest_and_a_commit_to_its_uploads(tmp_path: Path) -> None:
    content = LFS_FILES["copy.safetensors"]
    oid, size = hashlib.sha256(content).hexdigest(), len(content)

    def commit(announced_size: int) -> int:
        pointer = {"path": "a.safetensors", "algo": "sha256", "oid": oid, "size": announced_size}
        lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": pointer}]
        body = "\n".join(map(json.dumps, lines)).encode()
        return http(f"{hub.url}/api/models/me/tiny/commit/main", body, "POST", Authorization="Bearer hf_loopback")[0]

    with LoopbackHub() as hub:
        run_client(hub.environment(tmp_path), "create_repo('me/tiny')")
        assert http(f"{hub.url}/lfs/{oid}/{size}", content[:-1] + b"?", "PUT")[0] == 400
        assert http(f"{hub.url}/lfs/{oid}/{size - 1}", content, "PUT")[0] == 400
        assert commit(size) == 400, "nothing has been uploaded yet"
        assert http(f"{hub.url}/lfs/{oid}/{size}", content, "PUT")[0] == 200
        assert commit(size - 1) == 400
        assert len(hub.repositories["me/tiny"].commits) == 1
        assert commit(size) == 200


def test_half_a_request_is_not_handled() -> None:
    head = b"POST /api/repos/create HTTP/1.1\r\nHost: hub\r\nContent-Length: 999\r\n\r\n"
    with LoopbackHub() as hub:
        with socket.create_connection(("127.0.0.1", urlsplit(hub.url).port or 0)) as connection:
            connection.sendall(head + b'{"name": "tiny"}')
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
        assert hub.calls == []
        assert hub.repositories == {}


def test_after_the_block_nobody_listens() -> None:
    with LoopbackHub() as hub:
        assert http(f"{hub.url}/api/models/me/tiny")[0] == 401
    with pytest.raises(urllib.error.URLError, match="refused"):
        http(f"{hub.url}/api/models/me/tiny")


SAVE_PIPELINE = """
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
torch.manual_seed(0)
unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
                   layers_per_block=1, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
DDPMPipeline(unet, DDPMScheduler()).save_pretrained(sys.argv[1])
"""
SAMPLE_PIPELINE = """
import torch
from diffusers import DDPMPipeline
pipe = DDPMPipeline.from_pretrained(sys.argv[1])
generator = torch.Generator().manual_seed(1)
answer(pipe(generator=generator, num_inference_steps=2, output_type="np").images.ravel().tolist())
"""


def test_a_stock_pipeline_loads_from_its_hub_id_online_and_offline(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        publisher, reader = hub.environment(tmp_path / "publisher"), hub.environment(tmp_path / "reader")
        local = run_client(publisher, SAVE_PIPELINE + PUBLISH + SAMPLE_PIPELINE, tmp_path / "pipeline")
        assert run_client(reader, SAMPLE_PIPELINE, "me/tiny") == local
        calls_online = len(hub.calls)
        assert run_client(reader | {"HF_HUB_OFFLINE": "1"}, SAMPLE_PIPELINE, "me/tiny") == local
        assert len(hub.calls) == calls_online
    assert {call.route for call in hub.calls} >= {"lfs_upload", "commit", "model_info", "tree", "resolve"}
