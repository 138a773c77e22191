"""torchtune's recipes, fused: ``tune run liger_fx/recipes/<recipe> --config ... compile=True``."""

from importlib.metadata import PackageNotFoundError, version

TORCHTUNE = "0.6.1"


def _check_version() -> None:
    """The recipes build on what torchtune's do inside, which no version promises to keep."""
    try:
        found = version("torchtune")
    except PackageNotFoundError:
        found = "none"
    if not found.startswith(TORCHTUNE):
        raise ImportError(
            f"liger_fx/recipes are made for torchtune {TORCHTUNE}, installed is {found}: "
            "pip install 'liger_fx[torchtune]'"
        )


_check_version()
