"""Fixtures that every room's tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real films for tests, named by GENAILAB_REAL_DATA; skips where it is absent."""
    folder = os.environ.get("GENAILAB_REAL_DATA", "")
    if not folder:
        pytest.skip("GENAILAB_REAL_DATA is not set: tests on real films need a folder of them")
    if not Path(folder).is_dir():
        pytest.skip(f"GENAILAB_REAL_DATA={folder} is no folder: tests on real films need one")
    return Path(folder)
