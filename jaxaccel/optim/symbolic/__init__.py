"""Optimizers as programs, and the evolution that found Lion.

Chen et al., *Symbolic Discovery of Optimization Algorithms*, arXiv 2302.06675. What is made cheaper is the search:
programs are hashed before they are run, and run without being compiled.
"""

from jaxaccel.optim.symbolic.abstract import (
    infer,
    live_outputs,
    live_statements,
    program_hash,
    simplify,
    validate,
)
from jaxaccel.optim.symbolic.functions import FUNCTIONS, Function
from jaxaccel.optim.symbolic.interpreter import EncodedProgram, encode, interpret, leaf_sizes
from jaxaccel.optim.symbolic.mutate import CONSTANTS_ONLY, MutationError, MutationWeights, mutate
from jaxaccel.optim.symbolic.program import (
    ADAMW_PROGRAM,
    INPUTS,
    LION_PROGRAM,
    Program,
    ProgramError,
    Statement,
    parse,
    to_text,
)
from jaxaccel.optim.symbolic.transform import ProgramState, as_transform, execute
