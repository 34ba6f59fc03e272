"""What the environment says of mpiexec: none, one without --mpi, one that is of another MPI."""

import pytest

from mesp_ref.cli import main
from mesp_ref.errors import MespRefError
from mesp_ref.spread.launcher import check_alone, check_launcher, check_library

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}
MPICH = {"PMI_SIZE": "3", "PMI_RANK": "0"}


def test_another_mpis_mpiexec_is_found_out() -> None:
    """Its ranks do not find each other: each would believe itself rank 0 of 1 and write."""
    check_launcher(3, MPICH)
    check_launcher(1, {"PMI_SIZE": "1", "PMI_RANK": "0"})
    with pytest.raises(MespRefError, match=r"found 1 process in MPI, expected the 4 of OMPI_COMM"):
        check_launcher(1, OPEN_MPI)


def test_another_mpis_library_is_found_out_before_it_starts() -> None:
    mpich, ompi = "MPICH Version:      4.3.2\nMPICH ABI: 17", "Open MPI v5.0.11, package: Open MPI"
    check_library(mpich, MPICH)
    check_library(ompi, OPEN_MPI)
    with pytest.raises(MespRefError, match=r"found MPICH Version: +4\.3\.2 started by Open MPI"):
        check_library(mpich, OPEN_MPI)


def test_a_forgotten_mpiexec_is_told() -> None:
    with pytest.raises(MespRefError, match=r"--mpi: found no mpiexec that started this process"):
        check_launcher(1, {"PATH": "/bin", "OPENBLAS_NUM_THREADS": "1"})


@pytest.mark.parametrize("started", [MPICH, OPEN_MPI])
def test_a_forgotten_mpi_is_told_once(started: dict[str, str]) -> None:
    """N processes would each do the whole work and write one folder."""
    with pytest.raises(MespRefError, match=r"found [34] processes started by mpiexec.*add --mpi"):
        check_alone(True, started)
    with pytest.raises(MespRefError, match="start this command without mpiexec"):
        check_alone(False, started)
    others = {name: "2" if name.endswith("RANK") else value for name, value in started.items()}
    assert not check_alone(True, others)


def test_one_process_may_run_alone() -> None:
    assert check_alone(True, {})
    assert check_alone(True, {"PMI_SIZE": "1", "PMI_RANK": "0"})


def test_the_command_line_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in MPICH.items():
        monkeypatch.setenv(name, value)
    assert main(["info"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "start this command without mpiexec" in line
    monkeypatch.setenv("PMI_RANK", "1")
    assert main(["finetune"]) == 0
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "")


@pytest.mark.parametrize("started", [MPICH, OPEN_MPI])
@pytest.mark.parametrize("words", [["finetune", "--mpi", "--steps", "x"], ["--mpi"], ["nonsense"]])
def test_words_that_are_wrong_are_told_once(
    words: list[str],
    started: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All ranks are given the same words: rank 0 says what is wrong with them."""
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert main(words) == 2
    [_] = capsys.readouterr().err.splitlines()
    for name in started:
        if name.endswith("RANK"):
            monkeypatch.setenv(name, "1")
    assert main(words) == 0
    assert main(["finetune", "--help"]) == 0
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "")
