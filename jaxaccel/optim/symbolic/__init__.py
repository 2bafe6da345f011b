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
from jaxaccel.optim.symbolic.funnel import FunnelStage, funnel
from jaxaccel.optim.symbolic.interpreter import EncodedProgram, encode, interpret, leaf_sizes
from jaxaccel.optim.symbolic.mutate import ALL_EDITS, CONSTANTS_ONLY, MutationError, MutationWeights, mutate
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
from jaxaccel.optim.symbolic.proxy import make_fitness
from jaxaccel.optim.symbolic.search import (
    Improvement,
    SearchConfig,
    SearchState,
    SearchStats,
    evolve,
    search_init,
    search_step,
    state_from_json,
    state_to_json,
)
from jaxaccel.optim.symbolic.shorten import shorten
from jaxaccel.optim.symbolic.transform import ProgramState, as_transform, execute

__all__ = [
    "ADAMW_PROGRAM",
    "ALL_EDITS",
    "CONSTANTS_ONLY",
    "FUNCTIONS",
    "INPUTS",
    "LION_PROGRAM",
    "EncodedProgram",
    "Function",
    "FunnelStage",
    "Improvement",
    "MutationError",
    "MutationWeights",
    "Program",
    "ProgramError",
    "ProgramState",
    "SearchConfig",
    "SearchState",
    "SearchStats",
    "Statement",
    "as_transform",
    "encode",
    "evolve",
    "execute",
    "funnel",
    "infer",
    "interpret",
    "leaf_sizes",
    "live_outputs",
    "live_statements",
    "make_fitness",
    "mutate",
    "parse",
    "program_hash",
    "search_init",
    "search_step",
    "shorten",
    "simplify",
    "state_from_json",
    "state_to_json",
    "to_text",
    "validate",
]
