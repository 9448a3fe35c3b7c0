"""Downloads from the hub, from a local server with the hub's interface."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from customize.concepts.io.hub import is_collection_slug, is_hub_id
from customize.concepts.io.write_concept import save_concept
from tests.concepts.library.test_library import lora
from tests.concepts.making import small
from tests.forked import TORCH, run_forked

SLUG = "user/our-dogs-64f9a55bb3115b4f513ec026"


@contextmanager
def hub(folder: Path, items: list[dict[str, str]]):
    """A hub whose repositories are the folders of `folder`, with one collection.

    Yields its address and the list of files that were downloaded.
    """
    downloads: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def log_message(self, *args: object) -> None: ...

        def answer(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path == f"api/collections/{SLUG}":
                listed = [{"_id": "0", "position": k, **item} for k, item in enumerate(items)]
                facts = {"title": "Our dogs", "owner": "user", "items": listed, "position": 0}
                facts |= {"lastUpdated": "2026-01-01T00:00:00.000Z", "private": False}
                self.send(facts | {"slug": SLUG, "theme": "blue", "upvotes": 0})
            elif path.startswith("api/models/"):
                repo, endpoint = "/".join(path.split("/")[2:4]), path.split("/")[4]
                if not (folder / repo).is_dir():
                    self.send_error(404)
                    return
                files = sorted(file for file in (folder / repo).iterdir() if file.is_file())
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)}
                    for f in files
                ]
                names = [{"rfilename": file.name} for file in files]
                facts = {"id": repo, "sha": commit(repo), "siblings": names}
                self.send(facts if endpoint == "revision" else tree)
            elif "/resolve/" in path:
                repo, _, suffix = path.partition("/resolve/")
                file = folder / repo / suffix.partition("/")[2]
                head = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": commit(repo)}
                if self.command == "GET":
                    downloads.append(f"{repo}/{file.name}")
                self.send(file.read_bytes(), head)
            else:
                self.send_error(404)

        def send(self, body: object, head: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(200)
            for name, value in (head or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    def digest(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def commit(repo: str) -> str:
        digests = "".join(digest(f) for f in sorted((folder / repo).iterdir()) if f.is_file())
        return hashlib.sha1(digests.encode()).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloads
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served(tmp_path):
    """A user's repositories: two concepts, another user's LoRA, and a base model."""
    folder = tmp_path / "served"
    save_concept(small(), folder / "user" / "rex")
    other = {"6": [0, 1], "8": [2, 3]}
    save_concept(small(1, name="tom", trigger="<tom>", slices=other), folder / "user" / "tom")
    lora(folder / "else" / "water-colour" / "pytorch_lora_weights.safetensors")
    (folder / "user" / "base").mkdir()
    (folder / "user" / "base" / "model.safetensors").write_bytes(b"large")
    return folder


def collection(*names: str) -> list[dict[str, str]]:
    return [{"id": name, "type": "model"} for name in names]


def ask(script: str, address: str, home: Path) -> list[str]:
    """Run lines in another process, which reads the hub's address at its start; their output."""
    changes = {"HF_ENDPOINT": address, "HF_HOME": str(home)}
    changes |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    code = "from customize.concepts.library.library import Library\n" + script
    done = run_forked(code, preload=TORCH, **changes)
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


LIST = f"""
library = Library({SLUG!r})
print(*sorted(library.find_by_trigger(t)[0].source for t in ("<rex>", "<tom>", "<water-colour>")
              if library.find_by_trigger(t)))
"""

READ = """
from customize.concepts.io.read_concept import load_concept
rex = load_concept(library.path(library.find_by_trigger("<rex>")[0]))
print(float(rex.embeddings["text_encoder"][0, 0]))
"""


def test_collection_is_a_library(served, tmp_path):
    every = collection("user/rex", "user/tom", "else/water-colour", "user/base")
    every.append({"id": "user/pictures", "type": "dataset"})
    home = tmp_path / "home"
    with hub(served, every) as (address, downloads):
        assert ask(LIST, address, home)[0] == "rex tom water-colour"
        assert (
            "user/rex/concept.json" in downloads and "user/base/model.safetensors" not in downloads
        )
        downloads.clear()
        assert ask(LIST, address, home)[0] == "rex tom water-colour"
        assert downloads == []  # all files are cached
        save_concept(small(2), served / "user" / "new")
        shutil.rmtree(served / "user" / "rex")
        (served / "user" / "new").rename(served / "user" / "rex")
        lines = ask(LIST + READ, address, home)
        assert float(lines[1]) == pytest.approx(float(small(2).embeddings["text_encoder"][0, 0]))
    with hub(served, every[1:]) as (address, _):  # without rex
        assert ask(LIST, address, home)[0] == "tom water-colour"
    lines = ask(LIST, address, home)  # the hub is offline
    assert lines[0] == "tom water-colour" and any("its last download is used" in t for t in lines)


def test_repositories_of_one_name_get_different_folders(served, tmp_path):
    lora(served / "user" / "water-colour" / "pytorch_lora_weights.safetensors", value=2.0)
    both = collection("user/water-colour", "else/water-colour")
    with hub(served, both) as (address, _):
        lines = ask(f"print(*Library({SLUG!r}).entries)", address, tmp_path / "home")
    assert lines[0].split() == ["else-water-colour", "user-water-colour"]


FAIL = """
from customize.errors import CustomizeError
try:
    Library({!r})
except CustomizeError as error:
    print(type(error).__name__, str(error).replace("\\n", " "))
"""


def test_missing_repositories_and_collections_are_refused(served, tmp_path):
    home = tmp_path / "home"
    with hub(served, collection("user/rex", "user/gone")) as (address, _):
        (line,) = ask(FAIL.format(SLUG), address, home)
        assert line.startswith("ConceptError") and "user/gone" in line
        other = "user/no-such-64f9a55bb3115b4f513ec027"
        (line,) = ask(FAIL.format(other), address, home)
        assert line.startswith("ConfigError") and "listing the collection" in line and other in line


def test_existing_folder_takes_precedence_over_a_collection(tmp_path, monkeypatch):
    from customize.concepts.library.library import Library

    monkeypatch.chdir(tmp_path)
    save_concept(small(), tmp_path / SLUG / "rex")
    assert list(Library(SLUG).entries) == ["rex"]


@pytest.mark.parametrize("text", [SLUG, "a-b/64f9a55bb3115b4f513ec026"])
def test_collection_slugs(text):
    assert is_collection_slug(text)


@pytest.mark.parametrize("text", ["user/rex", "concepts", "/" + SLUG, SLUG[:-1], f"{SLUG}/x", ""])
def test_other_texts_are_not_collection_slugs(text):
    assert not is_collection_slug(text)
    assert is_hub_id(text) is (text.count("/") == 1 and text[0] != "/")
