"""More than one process, on one machine or several: data-parallel training over MPI, same bits."""
