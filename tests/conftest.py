import os

import pytest
import torch

os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """No compiled code, seed or report of an earlier test."""
    import liger_fx.backend

    torch._dynamo.reset()
    torch.manual_seed(0)
    liger_fx.backend._reports.clear()
