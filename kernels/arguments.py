"""Checks of the arguments of public kernels."""


def require(is_met: bool, name: str, expected: object, found: object) -> None:
    """Raises ValueError that names the argument, what it must be, and what it is."""
    if not is_met:
        raise ValueError(f"{name}: expected {expected}, found {found}")
