"""A fixture for tests that run a model's own code in this process: import it, and the whole module has it."""

import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def own_code_cache(tmp_path_factory):
    """transformers copies the code of a folder to a cache that tests running at the same time would share."""
    folder = tmp_path_factory.mktemp("modules")
    before = _loaded()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        yield folder
    _loaded()
    sys.modules.update(before)


def _loaded():
    """The modules of models' code, taken out of those that Python knows."""
    names = [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]
    return {name: sys.modules.pop(name) for name in names}
