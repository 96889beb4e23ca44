"""Finding backends: through real package metadata, no vendor's import, and a reason where one is not ready."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from k2lite.backends import registry
from k2lite.backends.base import CONTRACT
from k2lite.backends.reference import ReferenceBackend
from k2lite.backends.registry import Found, backend_names, find, open_backend
from k2lite.backends.spec import BackendSpec, Probe, probe_package
from k2lite.errors import BackendError, RequestError
from tests.conftest import REPO


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A way to install a package of one module that offers backends: metadata on sys.path, as pip leaves it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(module: str, source: str, *entries: str) -> None:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[k2lite.backends]\n" + "\n".join(entries) + "\n")

    return install


SPEC = """
    from k2lite.backends.reference import ReferenceBackend
    from k2lite.backends.spec import BackendSpec, Probe

    def spec():
        return BackendSpec("{name}", {contract}, {priority}, ReferenceBackend().capabilities(),
                           lambda: {probe}, ReferenceBackend)
"""


def source(name: str, *, contract: int = 1, priority: int = 50, probe: str = "Probe(True, 'all is well')") -> str:
    return SPEC.format(name=name, contract=contract, priority=priority, probe=probe)


def test_an_installed_one_is_found_by_name_and_taken_by_auto(install: object) -> None:
    install("mine_a", source("mine"), "mine = mine_a:spec")  # type: ignore[operator]
    assert "mine" in backend_names()
    assert isinstance(open_backend("mine"), ReferenceBackend)
    lines: list[str] = []
    open_backend("auto", notify=lines.append)
    assert lines == ["backend mine, the best that is ready: all is well"]


def test_auto_says_what_it_passed_over_and_why(install: object) -> None:
    probe = "Probe(False, 'no device node /dev/x0')"
    install("mine_b", source("better", probe=probe), "better = mine_b:spec")  # type: ignore[operator]
    lines: list[str] = []
    assert open_backend("auto", notify=lines.append).name == "cpu"
    assert lines[0].startswith("backend cpu, the best that is ready: ")
    assert lines[0].endswith("; better is not: no device node /dev/x0")


def test_a_named_one_that_is_not_ready_is_an_error_with_the_first_exception_behind_it(install: object) -> None:
    probe = "Probe(False, 'the driver is too old', error=OSError('libx.so.3'))"
    install("mine_c", source("old", probe=probe), "old = mine_c:spec")  # type: ignore[operator]
    with pytest.raises(BackendError, match=r"backend old is not ready: the driver is too old") as caught:
        open_backend("old")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_contract_of_another_number_is_refused_with_both(install: object) -> None:
    install("mine_d", source("new", contract=7), "new = mine_d:spec")  # type: ignore[operator]
    with pytest.raises(BackendError, match=f"written for contract 7, and this k2lite has contract {CONTRACT}"):
        open_backend("new")
    assert not find("new").probe().ready
    assert "contract 7" in find("new").probe().reason


@pytest.mark.parametrize(
    ("text", "entry", "said"),
    [
        ("import a_library_that_is_not_there", "x = {0}:spec", "ModuleNotFoundError"),
        ("def spec(): raise RuntimeError('nothing works')", "x = {0}:spec", "nothing works"),
        ("def spec(): return 5", "x = {0}:spec", "returned int, expected a BackendSpec"),
        (textwrap.dedent(source("y")), "x = {0}:spec", "calls itself 'y', its entry point 'x'"),
        ("", "x = {0}:spec", "AttributeError"),
        (textwrap.dedent(source("x")), "x = {0}:spec\n[k2lite.backends]\nz = {0}:spec", ""),
    ],
)
def test_a_broken_one_is_listed_with_its_exception_and_harms_no_other(
    install: object, text: str, entry: str, said: str, request: pytest.FixtureRequest
) -> None:
    module = f"broken_{abs(hash(request.node.name))}"
    install(module, text, entry.format(module))  # type: ignore[operator]
    if not said:
        assert find("z").probe().ready is False
        return
    found = find("x")
    assert not found.probe().ready
    assert said in found.probe().reason
    assert found.probe().error is not None
    with pytest.raises(BackendError, match="backend x can't be read"):
        open_backend("x")
    assert open_backend("auto").name == "cpu"


def test_two_packages_that_offer_one_name_are_told_apart(install: object) -> None:
    install("mine_e", source("twice"), "twice = mine_e:spec")  # type: ignore[operator]
    install("mine_f", source("twice"), "twice = mine_f:spec")  # type: ignore[operator]
    with pytest.raises(BackendError, match="several packages offer it: mine_e, mine_f; uninstall all but one"):
        open_backend("twice")


def test_a_name_of_ours_can_not_be_taken(install: object) -> None:
    install("mine_g", source("reference"), "reference = mine_g:spec")  # type: ignore[operator]
    assert backend_names().count("reference") == 1
    assert find("reference").spec is not None
    assert find("reference").spec.priority == 0  # type: ignore[union-attr]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BackendError, match=r"backend 'no' is unknown; known: auto, cpu, reference"):
        open_backend("no")


def test_a_probe_or_a_loader_that_raises_is_a_reason() -> None:
    def fail() -> Probe:
        raise RuntimeError("a bug of the vendor")

    spec = BackendSpec("x", 1, 0, ReferenceBackend().capabilities(), fail, ReferenceBackend)
    probe = Found("x", spec).probe()
    assert (probe.ready, probe.reason) == (False, "its probe failed: RuntimeError: a bug of the vendor")
    with pytest.raises(BackendError, match="x can't be loaded: RuntimeError: a bug of the vendor"):
        registry._load(replace(spec, load=fail), {})


def test_an_option_reaches_the_loader_that_has_it_and_is_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BackendSpec("x", 1, 9, ReferenceBackend().capabilities(), lambda: Probe(True, ""), ReferenceBackend)
    monkeypatch.setattr(registry, "find", lambda name: Found(name, spec))
    for name in ("x", "auto"):
        assert "naive" in open_backend(name, mla="naive", threads=None).capabilities().arithmetic
        with pytest.raises(RequestError, match="threads has no effect with backend 'x'"):
            open_backend(name, threads=2)


def test_a_package_that_is_there_and_broken_is_not_called_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "vendor_of_test.py").write_text("raise ImportError('libascendcl.so: cannot open shared object file')")
    broken = probe_package("vendor_of_test", lambda _: Probe(True, "fine"))
    assert "installed and can't be imported: ImportError: libascendcl.so" in broken.reason
    assert isinstance(broken.error, ImportError)
    absent = probe_package("vendor_that_is_not_there", lambda _: Probe(True, "fine"))
    assert (absent.ready, absent.reason) == (False, "the package vendor_that_is_not_there is not installed")


def test_evidence_comes_from_a_report_and_is_modest_without(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    spec = BackendSpec(
        "x", 1, 0, ReferenceBackend().capabilities(), lambda: Probe(True, ""), ReferenceBackend, "emulated", file
    )
    assert spec.evidence_text() == "emulated"
    report = {"passed": True, "date": "2026-11-24", "device": {"name": "Chip 9", "driver": "driver 3.1"}}
    file.write_text(json.dumps(report))
    assert spec.evidence_text() == "ran on hardware (2026-11-24, Chip 9, driver 3.1)"
    file.write_text(json.dumps({**report, "passed": False}))
    assert spec.evidence_text() == "emulated; the suite failed on hardware (2026-11-24)"


def test_discovery_imports_no_vendor_package() -> None:
    code = (
        "import sys\nfrom k2lite.backends.registry import backend_names, find\n"
        "specs = [find(name).spec for name in backend_names()]\n"
        "vendors = {package for spec in specs if spec for package in spec.vendor_packages}\n"
        "assert 'onnxruntime' in vendors\n"
        "assert not vendors & set(sys.modules), vendors & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
