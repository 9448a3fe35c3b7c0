"""What comes from the hub, from a server here that speaks the hub's own interface."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from customize.concepts.io.hub import is_collection_slug, is_hub_id
from customize.concepts.io.write_concept import save_concept
from tests.concepts.library.test_library import lora
from tests.concepts.making import small

SLUG = "user/our-dogs-64f9a55bb3115b4f513ec026"


@contextmanager
def hub(folder: Path, items: list[dict[str, str]]):
    """A hub whose repositories are the folders of `folder`, with one collection.

    Yields its address and the list of files that were downloaded.
    """
    given: list[str] = []

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
                repo, what = "/".join(path.split("/")[2:4]), path.split("/")[4]
                if not (folder / repo).is_dir():
                    self.send_error(404)
                    return
                files = sorted(each for each in (folder / repo).iterdir() if each.is_file())
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)}
                    for f in files
                ]
                names = [{"rfilename": each.name} for each in files]
                facts = {"id": repo, "sha": commit(repo), "siblings": names}
                self.send(facts if what == "revision" else tree)
            elif "/resolve/" in path:
                repo, _, rest = path.partition("/resolve/")
                file = folder / repo / rest.partition("/")[2]
                head = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": commit(repo)}
                if self.command == "GET":
                    given.append(f"{repo}/{file.name}")
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
        told = "".join(digest(f) for f in sorted((folder / repo).iterdir()) if f.is_file())
        return hashlib.sha1(told.encode()).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", given
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
    """Run lines in a process of its own, as the hub's address is read once; what they print."""
    surroundings = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home)}
    surroundings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    code = "from customize.concepts.library.library import Library\n" + script
    done = subprocess.run(
        [sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=False
    )
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


def test_a_collection_is_a_library(served, tmp_path):
    every = collection("user/rex", "user/tom", "else/water-colour", "user/base")
    every.append({"id": "user/pictures", "type": "dataset"})
    home = tmp_path / "home"
    with hub(served, every) as (address, given):
        assert ask(LIST, address, home)[0] == "rex tom water-colour"
        assert "user/rex/concept.json" in given and "user/base/model.safetensors" not in given
        given.clear()
        assert ask(LIST, address, home)[0] == "rex tom water-colour"
        assert given == []  # all is there
        save_concept(small(2), served / "user" / "new")
        shutil.rmtree(served / "user" / "rex")
        (served / "user" / "new").rename(served / "user" / "rex")
        told = ask(LIST + READ, address, home)
        assert float(told[1]) == pytest.approx(float(small(2).embeddings["text_encoder"][0, 0]))
    with hub(served, every[1:]) as (address, _):  # rex is taken out
        assert ask(LIST, address, home)[0] == "tom water-colour"
    told = ask(LIST, address, home)  # the hub is gone
    assert told[0] == "tom water-colour" and any("its last download is used" in t for t in told)


def test_two_of_one_name_are_told_apart(served, tmp_path):
    lora(served / "user" / "water-colour" / "pytorch_lora_weights.safetensors", value=2.0)
    both = collection("user/water-colour", "else/water-colour")
    with hub(served, both) as (address, _):
        told = ask(f"print(*Library({SLUG!r}).entries)", address, tmp_path / "home")
    assert told[0].split() == ["else-water-colour", "user-water-colour"]


FAIL = """
from customize.errors import CustomizeError
try:
    Library({!r})
except CustomizeError as error:
    print(type(error).__name__, str(error).replace("\\n", " "))
"""


def test_what_the_hub_does_not_have_is_refused(served, tmp_path):
    home = tmp_path / "home"
    with hub(served, collection("user/rex", "user/gone")) as (address, _):
        (told,) = ask(FAIL.format(SLUG), address, home)
        assert told.startswith("ConceptError") and "user/gone" in told
        other = "user/no-such-64f9a55bb3115b4f513ec027"
        (told,) = ask(FAIL.format(other), address, home)
        assert told.startswith("ConfigError") and "listing the collection" in told and other in told


def test_a_folder_of_that_name_is_the_folder(tmp_path, monkeypatch):
    from customize.concepts.library.library import Library

    monkeypatch.chdir(tmp_path)
    save_concept(small(), tmp_path / SLUG / "rex")
    assert list(Library(SLUG).entries) == ["rex"]


@pytest.mark.parametrize("text", [SLUG, "a-b/64f9a55bb3115b4f513ec026"])
def test_what_is_a_collection(text):
    assert is_collection_slug(text)


@pytest.mark.parametrize("text", ["user/rex", "concepts", "/" + SLUG, SLUG[:-1], f"{SLUG}/x", ""])
def test_what_is_none(text):
    assert not is_collection_slug(text)
    assert is_hub_id(text) is (text.count("/") == 1 and text[0] != "/")
