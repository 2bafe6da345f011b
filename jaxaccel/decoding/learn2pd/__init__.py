"""Learn2PD: fewer passes per token of a masked-diffusion language model, by a small filter that says what is final.

What it makes cheaper: filling in G masks takes G passes if each reveals one token. Most predictions are final long
before they are revealed. A pass reveals all that a policy holds for final, at least as many as a schedule demands, and
everything after an end of text is cut away:

    c = confidence of the block;   reveal {masked i: σ(f(c))_i > τ} ∪ {the k most confident masked i},   until no masks

    records = collect_oracle(model, params, prompts, answers, block_length=32, mask_id=m)   # answers: decoded slowly
    trained = train_filter(records, key=key)
    out = decode(model, params, prompts, gen_length=256, block_length=32, policy=Filter(trained.params), mask_id=m,
                 eot_id=e)

When to use it: batch 1 to a few, answers much shorter than the space for them, models that are sure of many tokens at
once. When not: first try `Threshold(0.9)`, which needs no training; a filter of one confidence per position can hardly
know more. A dual cache can cost accuracy, and rule (b) of the reference's end of text can cut long answers.

Three things differ from the reference code: the mask itself is never predicted (there a block may spin on it), ranks
never reach beyond the block's masks (there the top k may pick tokens of later blocks), and batches are allowed.

Source: Bao et al., Learning to Parallel: Accelerating Diffusion Large Language Models via Learnable Parallel Decoding,
arXiv 2509.25188; caches and thresholds: Wu et al., Fast-dLLM, arXiv 2505.22618; the model: LLaDA, arXiv 2502.09992.
"""

from jaxaccel.decoding.learn2pd.confidence import DiffusionModel, confidence_and_token
from jaxaccel.decoding.learn2pd.decode import DecodeResult, decode
from jaxaccel.decoding.learn2pd.filter import FilterParams, filter_apply, filter_init
from jaxaccel.decoding.learn2pd.filter_file import FilterInfo, load_filter, save_filter
from jaxaccel.decoding.learn2pd.oracle import OracleRecords, collect_oracle
from jaxaccel.decoding.learn2pd.policies import (
    Filter,
    Oracle,
    Policy,
    Threshold,
    TopK,
    accept_mask,
    num_transfer_tokens,
)
from jaxaccel.decoding.learn2pd.train import FilterTraining, train_filter

__all__ = [
    "DecodeResult",
    "DiffusionModel",
    "Filter",
    "FilterInfo",
    "FilterParams",
    "FilterTraining",
    "Oracle",
    "OracleRecords",
    "Policy",
    "Threshold",
    "TopK",
    "accept_mask",
    "collect_oracle",
    "confidence_and_token",
    "decode",
    "filter_apply",
    "filter_init",
    "load_filter",
    "num_transfer_tokens",
    "save_filter",
    "train_filter",
]
