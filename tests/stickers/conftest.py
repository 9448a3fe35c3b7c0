"""Artwork that the tests of stickers share."""

import pytest

from tests.stickers.making import write_artwork


@pytest.fixture(scope="session")
def artwork(tmp_path_factory):
    return write_artwork(tmp_path_factory.mktemp("artwork") / "stickers")
