"""What the environment says of mpiexec, before MPI is started and where it never is."""

from collections.abc import Mapping

from mesp_ref.errors import MespRefError

_SIZES = "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"  # MPICH and its kin, Open MPI
_RANKS = "PMI_RANK", "OMPI_COMM_WORLD_RANK"
_OTHER = (
    "this mpiexec belongs to another MPI than the one that mpi4py loaded; use the mpiexec beside it"
)
_STARTED = "PMI_", "PMIX_", "OMPI_"  # how names of variables of a launcher begin


def check_launcher(size: int, environment: Mapping[str, str]) -> None:
    """Raise MespRefError where `size` ranks of MPI are not those that a launcher started.

    Either none did: mpiexec was forgotten. Or it started more than MPI knows: each would run alone.
    """
    if size > 1:
        return
    if not any(name.startswith(_STARTED) for name in environment):
        raise MespRefError(
            "--mpi: found no mpiexec that started this process, expected mpiexec -n N mesp-ref …; "
            "without --mpi one process does it alone"
        )
    for name in _SIZES:
        started = environment.get(name, "1")
        if started != "1":
            raise MespRefError(
                f"--mpi: found 1 process in MPI, expected the {started} of {name}: {_OTHER}"
            )


def check_library(version: str, environment: Mapping[str, str]) -> None:
    """Raise MespRefError where Open MPI's mpirun started a process whose library is another.

    version   what MPI_Get_library_version says: MPICH, for one, ends the process when it is started so
    """
    library = version.split(",")[0].split("\n")[0].strip()
    if "OMPI_COMM_WORLD_SIZE" in environment and not library.startswith("Open MPI"):
        raise MespRefError(f"--mpi: found {library} started by Open MPI's mpirun: {_OTHER}")


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process says what all ranks find alike: the only one, or rank 0 of several."""
    return all(environment.get(name, "0") == "0" for name in _RANKS)


def check_alone(knows_mpi: bool, environment: Mapping[str, str]) -> bool:
    """Whether a command without --mpi may run: False on ranks other than 0 of several.

    knows_mpi   whether the command has an option --mpi
    Raises MespRefError on rank 0 of several: each would do the whole work, and write the same files
    """
    sizes = [environment[name] for name in _SIZES if environment.get(name, "1") != "1"]
    if not sizes:
        return True
    if not is_first(environment):
        return False
    advice = "add --mpi" if knows_mpi else "start this command without mpiexec"
    raise MespRefError(
        f"--mpi: missing, found {sizes[0]} processes started by mpiexec, each of which would do the "
        f"whole work and write the same files; {advice}"
    )
