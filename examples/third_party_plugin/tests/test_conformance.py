"""The penalty and the adapter keep every law."""

from collections.abc import Callable

from regkit.testing import parametrize_conformance

from regkit_nuclear import MinimalGatedAdapter, NuclearNorm


@parametrize_conformance([NuclearNorm(strength=1.0)])
def test_nuclear_norm(check: Callable[[], None]) -> None:
    check()


@parametrize_conformance([MinimalGatedAdapter()])
def test_minimal_gated_adapter(check: Callable[[], None]) -> None:
    check()
