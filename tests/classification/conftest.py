"""What the tests of this room share: a cache of their own, and the recorded table of a script."""

import json

import pytest


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENAILAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def bench(load_script, request):
    """Give the script that the test file names."""
    return load_script(request.module.SCRIPT)


@pytest.fixture(scope="module")
def table(bench):
    return json.loads(bench.TABLE.read_text(encoding="utf-8"))
