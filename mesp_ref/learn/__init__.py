"""The tutor: write each backward yourself, and be told what is wrong with it.

from mesp_ref import learn
learn.show("rmsnorm_bwd")                      # the exercise
learn.check("rmsnorm_bwd", my_rmsnorm_bwd)     # what is right, what is wrong, what it looks like

exercise   what an exercise is: one row       exercises/   the rows
call       a student's function is called     compare      and held against the truth
explain    which mistake it looks like        facts        what can be said where none is known
"""

from mesp_ref.learn.exercises import EXERCISES, find
from mesp_ref.learn.result import Result
from mesp_ref.learn.statement import show
from mesp_ref.learn.tutor import check

__all__ = ["EXERCISES", "Result", "check", "find", "show"]
