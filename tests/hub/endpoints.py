"""The endpoints of the loopback Hub: what it answers to each call, and to whom."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import traceback
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs

import yaml  # type: ignore[import-untyped, unused-ignore]

from hub.messages import Call, HubError, Response, Route, Routes, error_response, json_response
from hub.storage import HEADS, PULL_REQUESTS, Blob, Commit, Repository
from hub.xet import XetStore

Right = Literal["read", "write"]
ROUTES = Routes()


def card_metadata(readme: str) -> dict[str, Any]:
    """Parse the YAML block at the head of a README.md; {} without one."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", readme, flags=re.DOTALL)
    return (yaml.safe_load(block[1]) or {}) if block else {}


class Endpoints:
    """The state of a Hub and its answers. All tokens are of one user, `me`, who may see and name everything."""

    def __init__(self, url: str, lfs_suffixes: tuple[str, ...], xet_store: XetStore | None) -> None:
        self.url = url
        self.lfs_suffixes = lfs_suffixes
        self.xet_store = xet_store
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, Right] = {"hf_loopback": "write"}
        self.lfs_objects: dict[str, Blob] = {}

    def answer(self, call: Call, route: Route, parts: dict[str, str]) -> Response:
        try:
            right = self._right(call)
            if "repo" in parts:
                self._check_visible(parts["repo"], right)
            if route.writes:
                self._check_may_write(right, in_repository="repo" in parts)
            return route.endpoint(self, call, **parts)
        except HubError as error:
            return error.response
        except Exception:  # a malformed request, or a bug here: 400, which the client shows and does not retry
            return json_response({"error": traceback.format_exc()}, 400)

    def _right(self, call: Call) -> Right | None:
        token = call.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _check_visible(self, repo: str, right: Right | None) -> None:
        """Whether a repository is missing or private, strangers can't tell."""
        repository = self.repositories.get(repo)
        if repository is not None and (right or not repository.private):
            return
        status, message = (404, "Repository not found") if right else (401, "Invalid username or password.")
        raise HubError(status, message, {"X-Error-Code": "RepoNotFound"})

    def _check_may_write(self, right: Right | None, *, in_repository: bool) -> None:
        """The code is what the client by itself adds to a 401, but only if the Hub's address is one of https."""
        if right is None:
            code = {"X-Error-Code": "RepoNotFound"} if in_repository else {}
            raise HubError(401, "Invalid username or password.", code)
        if right == "read":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")

    @ROUTES.add("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Response:
        right = self._right(call)
        if right is None:
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": right}}
        return json_response({"type": "user", "id": "1", "name": "me", "fullname": "Me", "orgs": [], "auth": token})

    @ROUTES.add("GET", "/api/agent-harnesses")
    def agent_harnesses(self, call: Call) -> Response:
        """Name no programs that use the Hub for their users; a client asks once per cache, before its first call."""
        return json_response({"standardEnvVars": [], "harnesses": {}})

    @ROUTES.add("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Response:
        try:
            card_metadata(json.loads(call.body)["content"])
        except yaml.YAMLError as error:
            return json_response({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return json_response({"errors": [], "warnings": []})

    # Repositories and their refs

    @ROUTES.add("POST", "/api/repos/create", writes=True)
    def create_repo(self, call: Call) -> Response:
        wish = json.loads(call.body)
        kind = wish.get("type") or "model"
        if kind not in ("model", "space"):
            raise HubError(501, "the loopback Hub holds models and Spaces only")
        if kind == "space" and not wish.get("sdk"):
            raise HubError(400, "a Space needs an sdk")
        repo = f"{'spaces/' if kind == 'space' else ''}{wish.get('organization') or 'me'}/{wish['name']}"
        answer = {"url": f"{self.url}/{repo}", "name": repo}
        if repo in self.repositories:
            return json_response({**answer, "error": f"You already created this {kind} repo"}, 409)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in self.lfs_suffixes)
        private = wish.get("visibility") == "private" or wish.get("private") is True  # the latter from clients 1.x
        self.repositories[repo] = Repository(private, {".gitattributes": Blob(attributes.encode())})
        return json_response(answer)

    @ROUTES.add("DELETE", "/api/repos/delete", writes=True)
    def delete_repo(self, call: Call) -> Response:
        wish = json.loads(call.body)
        repo = f"{wish.get('organization') or 'me'}/{wish['name']}"
        self._check_visible(repo, "write")
        del self.repositories[repo]
        return Response()

    @ROUTES.add("GET", "/api/models/<repo>/auth-check")
    def auth_check(self, call: Call, repo: str) -> Response:
        return json_response({})

    @ROUTES.add("GET", "/api/models/<repo>/auth-check/write", writes=True)
    def auth_check_write(self, call: Call, repo: str) -> Response:
        return json_response({})

    @ROUTES.add("POST", "/api/models/<repo>/branch/<branch>", writes=True)
    def create_branch(self, call: Call, repo: str, branch: str) -> Response:
        start = json.loads(call.body).get("startingPoint", "main")
        return self._create_ref(self.repositories[repo], f"refs/heads/{branch}", start)

    @ROUTES.add("POST", "/api/models/<repo>/tag/<revision>", writes=True)
    def create_tag(self, call: Call, repo: str, revision: str) -> Response:
        return self._create_ref(self.repositories[repo], f"refs/tags/{json.loads(call.body)['tag']}", revision)

    def _create_ref(self, repository: Repository, ref: str, start: str) -> Response:
        if ref in repository.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repository.refs[ref] = repository.at(start).oid
        return json_response({})

    @ROUTES.add("DELETE", "/api/models/<repo>/branch/<branch>", writes=True)
    def delete_branch(self, call: Call, repo: str, branch: str) -> Response:
        if branch == "main":
            raise HubError(403, "The default branch can't be deleted")
        return self._delete_ref(self.repositories[repo], f"refs/heads/{branch}")

    @ROUTES.add("DELETE", "/api/models/<repo>/tag/<tag>", writes=True)
    def delete_tag(self, call: Call, repo: str, tag: str) -> Response:
        return self._delete_ref(self.repositories[repo], f"refs/tags/{tag}")

    def _delete_ref(self, repository: Repository, ref: str) -> Response:
        if ref not in repository.refs:
            raise HubError(404, f"Reference does not exist: {ref}", {"X-Error-Code": "RevisionNotFound"})
        del repository.refs[ref]
        return json_response({})

    @ROUTES.add("GET", "/api/models/<repo>/refs")
    def refs(self, call: Call, repo: str) -> Response:
        repository = self.repositories[repo]

        def listing(prefix: str, name_from: str) -> list[dict[str, str]]:
            refs = ((ref, oid) for ref, oid in repository.refs.items() if ref.startswith(prefix))
            return [{"name": ref.removeprefix(name_from), "ref": ref, "targetCommit": oid} for ref, oid in refs]

        answer = {"branches": listing(HEADS, HEADS), "tags": listing("refs/tags/", "refs/tags/"), "converts": []}
        pull_requests = {"pullRequests": listing(PULL_REQUESTS, "refs/")} if call.query.get("include_prs") else {}
        return json_response(answer | pull_requests)

    # Uploads and commits

    @ROUTES.add("POST", "/api/models/<repo>/preupload/<revision>", writes=True)
    def preupload(self, call: Call, repo: str, revision: str) -> Response:
        present = self.repositories[repo].at(revision).files

        def advice(path: str) -> dict[str, object]:
            mode = "lfs" if path.endswith(self.lfs_suffixes) else "regular"
            oid = present[path].etag if path in present else None
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return json_response({"files": [advice(file["path"]) for file in json.loads(call.body)["files"]]})

    @ROUTES.add("POST", r"/<repo>\.git/info/lfs/objects/batch", writes=True)
    def lfs_batch(self, call: Call, repo: str) -> Response:
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(call.body)["objects"]]
        for item in objects:
            if item["oid"] not in self.lfs_objects:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}/{item['size']}"}}
        return json_response({"transfer": "basic", "objects": objects})

    @ROUTES.add("PUT", "/lfs/<oid>/<size>")
    def lfs_upload(self, call: Call, oid: str, size: str) -> Response:
        """Take what was announced; on the Hub this is another server, and the client sends it no token."""
        if len(call.body) != int(size) or hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, f"The upload is not the announced {size} bytes with sha256 {oid}")
        self.lfs_objects[oid] = Blob(call.body, lfs=True)
        return Response()

    @ROUTES.add("GET", "/api/models/<repo>/xet-write-token/<revision>", writes=True)
    def xet_write_token(self, call: Call, repo: str, revision: str) -> Response:
        return self.xet_read_token(call, repo, revision)

    @ROUTES.add("GET", "/api/models/<repo>/xet-read-token/<revision>")
    def xet_read_token(self, call: Call, repo: str, revision: str) -> Response:
        if self.xet_store is None:
            raise HubError(501, "this loopback Hub was started without a Xet store")
        return self.xet_store.token()

    @ROUTES.add("POST", "/api/models/<repo>/commit/<branch>", writes=True)
    def commit(self, call: Call, repo: str, branch: str) -> Response:
        """Move the branch when every operation has been understood, or not at all; or open a pull request."""
        repository = self.repositories[repo]
        head = repository.head(branch)
        (_, header), *operations = ((line["key"], line["value"]) for line in map(json.loads, call.body.splitlines()))
        if not repository.refs[head].startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.at(head).files)
        for key, value in operations:
            self._apply(files, key, value)
        pull_request = {}
        if call.query.get("create_pr"):
            number = repository.open_pull_request(header["summary"], head)
            head = f"{PULL_REQUESTS}{number}"
            pull_request = {"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"}
        oid = repository.commit(head, header["summary"], files, header.get("description", "")).oid
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}
        return json_response(answer | pull_request)

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"].rstrip("/")
        if not path or path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise HubError(400, f"{value['path']!r} is no path within a repository")
        if key == "file" and value["encoding"] == "base64":
            files[path] = Blob(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            files[path] = self._lfs_object(path, value["oid"], value.get("size"))
        elif key in ("deletedFile", "deletedFolder"):
            _delete(files, path, folder=key == "deletedFolder")
        else:
            raise HubError(400, f"{path}: the loopback Hub can't do {key} here")

    def _lfs_object(self, path: str, oid: str, size: int | None) -> Blob:
        """What has been uploaded with this digest; a copy within the repository comes without a size."""
        if oid not in self.lfs_objects and self.xet_store is not None and size is not None:
            stored = self.xet_store.read(oid, size)
            self.lfs_objects |= {oid: stored} if stored else {}
        blob = self.lfs_objects.get(oid)
        if blob is None or size not in (None, len(blob.content)):
            raise HubError(400, f"{path}: there is no LFS object {oid} of {size} bytes")
        return blob

    @ROUTES.add("POST", "/api/models/<repo>/discussions", writes=True)
    def open_pull_request(self, call: Call, repo: str) -> Response:
        wish = json.loads(call.body)
        if not wish["pullRequest"]:
            raise HubError(501, "the loopback Hub has pull requests, but no other discussions")
        return json_response({"num": self.repositories[repo].open_pull_request(wish["title"])})

    @ROUTES.add("GET", "/api/models/<repo>/discussions")
    def pull_requests(self, call: Call, repo: str) -> Response:
        """All of them on one page; none is ever closed."""
        found = [self._described(repo, number) for number in self.repositories[repo].pull_request_titles]
        return json_response({"discussions": found, "count": len(found), "start": 0})

    @ROUTES.add("GET", "/api/models/<repo>/discussions/<number>")
    def pull_request(self, call: Call, repo: str, number: str) -> Response:
        repository = self.repositories[repo]
        if int(number) not in repository.pull_request_titles:
            raise HubError(404, f"There is no pull request {number}")
        changes = {"events": [], "changes": {"base": f"{HEADS}main"}, "filesWithConflicts": []}
        return json_response({**self._described(repo, int(number)), **changes})

    def _described(self, repo: str, number: int) -> dict[str, object]:
        repository = self.repositories[repo]
        *_, first = repository.history(f"{PULL_REQUESTS}{number}")
        identity = {"num": number, "title": repository.pull_request_titles[number], "author": {"name": "me"}}
        state = {"status": "open", "isPullRequest": True, "createdAt": first.date}
        return {**identity, **state, "repo": {"name": repo, "type": "model"}}

    # Reading

    @ROUTES.add("GET", "/api/models/<repo>")
    def model_info(self, call: Call, repo: str, revision: str = "main") -> Response:
        repository = self.repositories[repo]
        commit = repository.at(revision)
        identity = {"id": repo.removeprefix("datasets/"), "sha": commit.oid}
        if wanted := call.query.get("expand"):
            if set(wanted.split(",")) - {"evalResults", "sha"}:
                raise HubError(501, f"the loopback Hub can't expand {wanted}")
            return json_response(identity | {"evalResults": _eval_results(commit)})
        card = _card(commit)

        def sibling(path: str, blob: Blob) -> dict[str, object]:
            details = {"size": len(blob.content), "blobId": blob.oid, "lfs": blob.lfs_entry("sha256")}
            return {"rfilename": path, **(details if "blobs" in call.query else {})}

        siblings = [sibling(path, blob) for path, blob in sorted(commit.files.items())]
        identity |= {"modelId": identity["id"], "author": identity["id"].split("/")[0]}
        state = {"private": repository.private, "gated": False, "disabled": False, "lastModified": commit.date}
        described: dict[str, object] = {"tags": card.get("tags", []), "cardData": card}
        described |= {name: card[name] for name in ("library_name", "pipeline_tag", "model-index") if name in card}
        return json_response({**identity, **state, **described, "siblings": siblings})

    @ROUTES.add("GET", "/api/models/<repo>/revision/<revision>")
    def model_info_at_revision(self, call: Call, repo: str, revision: str) -> Response:
        return self.model_info(call, repo, revision)

    @ROUTES.add("GET", "/api/models/<repo>/commits/<revision>")
    def commits(self, call: Call, repo: str, revision: str) -> Response:
        def entry(commit: Commit) -> dict[str, object]:
            words = {"title": commit.title, "message": commit.message}
            return {"id": commit.oid, "authors": [{"user": "me"}], "date": commit.date, **words, "formatted": words}

        return json_response([entry(commit) for commit in self.repositories[repo].history(revision)])

    @ROUTES.add("GET", "/api/models/<repo>/tree/<revision>")
    def tree(self, call: Call, repo: str, revision: str, path: str = "") -> Response:
        recursive = call.query.get("recursive", "").lower() == "true"
        return json_response(self.repositories[repo].at(revision).tree(path, recursive=recursive))

    @ROUTES.add("GET", "/api/models/<repo>/tree/<revision>/<path>")
    def tree_of_folder(self, call: Call, repo: str, revision: str, path: str) -> Response:
        return self.tree(call, repo, revision, path)

    @ROUTES.add("POST", "/api/models/<repo>/paths-info/<revision>")
    def paths_info(self, call: Call, repo: str, revision: str) -> Response:
        """Describe the paths of a form that exist, and leave out the others, as the Hub does."""
        commit = self.repositories[repo].at(revision)
        entries = (commit.entry(path.rstrip("/")) for path in parse_qs(call.body.decode()).get("paths", []))
        return json_response([entry for entry in entries if entry is not None])

    @ROUTES.add("GET", "/<repo>/resolve/<revision>/<path>")
    def resolve(self, call: Call, repo: str, revision: str, path: str) -> Response:
        commit = self.repositories[repo].at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise HubError(404, f"{path} does not exist on {revision}", headers | {"X-Error-Code": "EntryNotFound"})
        blob = commit.files[path]
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.etag}"'}
        if blob.xet_hash:
            token = f"{self.url}/api/models/{repo}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{token}>; rel="xet-auth"'}
        return _in_range(blob.content, call.headers.get("Range", ""), headers)


def unknown(call: Call) -> Response:
    return error_response(501, f"the loopback Hub does not know {call.method} {call.path}")


def _card(commit: Commit) -> dict[str, Any]:
    """The card's metadata; {} if it can't be read, as the Hub shows a page all the same."""
    if "README.md" not in commit.files:
        return {}
    try:
        metadata = card_metadata(commit.files["README.md"].content.decode(errors="replace"))
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _eval_results(commit: Commit) -> list[dict[str, object]]:
    """Each entry of each `.eval_results/*.yaml`, as the Hub hands them to its client, or what is wrong with a file."""
    found: list[dict[str, object]] = []
    for path, blob in sorted(commit.files.items()):
        if not re.fullmatch(r"\.eval_results/[^/]+\.yaml", path):
            continue
        try:
            entries = yaml.safe_load(blob.content)
            for entry in entries:
                missing = {"id", "task_id"} - entry["dataset"].keys() | {"value"} - entry.keys()
                if (
                    missing
                    or not isinstance(entry["value"], (int, float))
                    or not entry.get("source", {"url": 1})["url"]
                ):
                    raise ValueError(f"an entry lacks {sorted(missing) or 'a number or a url'}")
            found += [{"filename": path, "verified": False, "data": entry} for entry in entries]
        except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            found.append({"filename": path, "error": str(error)})
    return found


def _delete(files: dict[str, Blob], path: str, *, folder: bool) -> None:
    doomed = [name for name in files if (name.startswith(f"{path}/") if folder else name == path)]
    if not doomed:
        raise HubError(404, f"A file with this name doesn't exist: {path}", {"X-Error-Code": "EntryNotFound"})
    for name in doomed:
        del files[name]


def _in_range(content: bytes, wanted: str, headers: dict[str, str]) -> Response:
    """Answer with the whole content or, for `Range: bytes=first-` or `bytes=first-last`, with that part of it."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if match is None:
        return Response(200, content, headers)
    first, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
    if first >= stop:
        return Response(416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
    return Response(206, content[first:stop], {**headers, "Content-Range": f"bytes {first}-{stop - 1}/{len(content)}"})
