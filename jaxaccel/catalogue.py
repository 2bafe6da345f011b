"""One source of truth for the 33 methods; the README's table, the docs and ``python -m experiments list`` read it.

A method is *done* when it has a module, a test, a page in the docs and an experiment; a test holds the list to that.
"""

import dataclasses
import difflib
from typing import Literal

Status = Literal["done", "planned"]

FAMILIES: tuple[str, ...] = (
    "optim",
    "attention",
    "moe",
    "caching",
    "decoding",
    "compression",
    "continual",
    "curation",
    "posttraining",
    "forecasting",
    "boosting",
    "robustness",
    "meta",
    "science",
    "models",
)
"""The families in the order in which tables show them; each is a subpackage of ``jaxaccel`` once it has a method."""


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """One published method.

    Attributes:
        slug: short name, the same in files, pages, records and commands.
        name: how the field calls it.
        paper: title of the paper.
        authors: separated by commas, with initials where known.
        arxiv: arXiv identifier.
        family: room it lives in, one of `FAMILIES`.
        module: dotted module, existing for a done method and planned otherwise.
        cheaper: what it makes cheaper, in one line.
        status: ``done`` or ``planned``.
        experiments: names for ``python -m experiments run``.
    """

    slug: str
    name: str
    paper: str
    authors: str
    arxiv: str
    family: str
    module: str
    cheaper: str
    status: Status = "planned"
    experiments: tuple[str, ...] = ()

    @property
    def year(self) -> int:
        """Year of the first version on arXiv, which the identifier begins with."""
        return 2000 + int(self.arxiv[:2])

    @property
    def url(self) -> str:
        """Address of the paper's abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"


METHODS: tuple[Method, ...] = (
    Method(
        slug="exadam",
        name="EXAdam",
        paper="EXAdam: The Power of Adaptive Cross-Moments",
        authors="Ahmed M. Adly",
        arxiv="2412.20302",
        family="optim",
        module="jaxaccel.optim.exadam",
        cheaper="training: fewer epochs to a target loss than Adam, at Adam's memory",
        status="done",
        experiments=("exadam",),
    ),
    Method(
        slug="lion",
        name="Lion and its program search",
        paper="Symbolic Discovery of Optimization Algorithms",
        authors="Chen, Liang, Huang, Real, Wang, Liu, Pham, Dong, Luong, Hsieh, Lu, Le",
        arxiv="2302.06675",
        family="optim",
        module="jaxaccel.optim.lion",
        cheaper="optimizer state: one momentum instead of Adam's two; the search: programs hashed before they are run",
        status="done",
        experiments=("lion", "lion_search"),
    ),
    Method(
        slug="accelat",
        name="AccelAT",
        paper=(
            "AccelAT: A Framework for Accelerating the Adversarial Training of Deep Neural Networks "
            "through Accuracy Gradient"
        ),
        authors="F. Nikfam, A. Marchisio, M. Martina, M. Shafique",
        arxiv="2210.06888",
        family="optim",
        module="jaxaccel.optim.accelat",
        cheaper="adversarial training: fewer epochs, by lowering the learning rate once accuracy stops rising",
        status="done",
        experiments=("accelat",),
    ),
    Method(
        slug="local_linear_attention",
        name="Local linear attention",
        paper=(
            "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression"
        ),
        authors="Zuo, Yin, Zeng, Li, Zhu, Wang",
        arxiv="2510.01450",
        family="attention",
        module="jaxaccel.attention.local_linear_attention",
        cheaper="memory of local-linear attention: blockwise, linear in sequence length (still dearer than softmax)",
        status="done",
        experiments=("local_linear_regression", "local_linear_in_context"),
    ),
    Method(
        slug="kinetics",
        name="Kinetics",
        paper="Kinetics: Rethinking Test-Time Scaling Laws",
        authors="Sadhukhan, Chen, Zheng, Zhou, Strubell, Chen",
        arxiv="2506.05333",
        family="attention",
        module="jaxaccel.attention.block_topk_attention",
        cheaper="long or repeated generation: reads only the most relevant blocks of the KV cache",
        status="done",
        experiments=("kinetics", "block_topk_recall", "block_topk_latency"),
    ),
    Method(
        slug="blockffn",
        name="BlockFFN",
        paper=(
            "BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level Activation Sparsity"
        ),
        authors="C. Song, W. Zhao, X. Han, C. Xiao, Y. Chen, Y. Li, Z. Liu, M. Sun",
        arxiv="2507.08771",
        family="moe",
        module="jaxaccel.moe.block_ffn",
        cheaper="decoding: feed-forward weights are read only for experts that a chunk of tokens uses",
        status="done",
        experiments=("blockffn",),
    ),
    Method(
        slug="harmonica",
        name="HarmoniCa",
        paper=(
            "HarmoniCa: Harmonizing Training and Inference for Better Feature Cach(ing) "
            "in Diffusion Transformer Acceleration"
        ),
        authors="Y. Huang, Z. Wang, R. Gong, J. Liu, X. Zhang, J. Guo, X. Liu, J. Zhang",
        arxiv="2410.01723",
        family="caching",
        module="jaxaccel.caching.harmonica",
        cheaper="diffusion sampling: a learned table reuses block outputs of earlier steps",
        status="done",
        experiments=("harmonica",),
    ),
    Method(
        slug="efficient_vla",
        name="EfficientVLA",
        paper="EfficientVLA: Training-Free Acceleration and Compression for Vision-Language-Action Models",
        authors="Y. Yang, Y. Wang, Z. Wen, L. Zhongwei, C. Zou, Z. Zhang, C. Wen, L. Zhang",
        arxiv="2506.10100",
        family="caching",
        module="jaxaccel.caching.efficient_vla",
        cheaper="robot policies: drops layers and visual tokens and reuses denoising features, without training",
        status="done",
        experiments=("efficient_vla",),
    ),
    Method(
        slug="llm_acceleration",
        name="Medusa and SnapKV",
        paper="New Solutions on LLM Acceleration, Optimization, and Application",
        authors="Huang, Wan, Ye, Jha, Wang, Li, Zhang, Chen",
        arxiv="2406.10903",
        family="decoding",
        module="jaxaccel.decoding.medusa",
        cheaper="text generation: fewer decode steps (speculative heads) and a smaller cache of the prompt",
        status="done",
        experiments=("medusa", "snapkv_recall"),
    ),
    Method(
        slug="learn2pd",
        name="Learn2PD",
        paper="Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding",
        authors="W. Bao, Z. Chen, D. Xu, Y. Shang",
        arxiv="2509.25188",
        family="decoding",
        module="jaxaccel.decoding.learn2pd",
        cheaper="diffusion language models: fewer forward passes per token, a small filter decides what is final",
        status="done",
        experiments=("learn2pd",),
    ),
    Method(
        slug="qfx",
        name="QFX",
        paper="Trainable Fixed-Point Quantization for Deep Learning Acceleration on FPGAs",
        authors="Dai, Y. Zhang, J. Zhang, Hu, Cai, Sun, Z. Zhang",
        arxiv="2401.17544",
        family="compression",
        module="jaxaccel.compression.fixed_point",
        cheaper="inference on FPGAs: fixed-point arithmetic with learned binary points, weights without multipliers",
        status="done",
        experiments=("qfx",),
    ),
    Method(
        slug="continual",
        name="Continual learning toolkit",
        paper="A Comprehensive Survey of Continual Learning: Theory, Method and Application",
        authors="L. Wang, X. Zhang, H. Su, J. Zhu",
        arxiv="2302.00487",
        family="continual",
        module="jaxaccel.continual",
        cheaper="learning a sequence of tasks: each is trained once instead of retraining on everything",
    ),
    Method(
        slug="lcia",
        name="LCIA",
        paper="Large Continual Instruction Assistant",
        authors="J. Qiao, Z. Zhang, X. Tan, Y. Qu, S. Ding, Y. Xie",
        arxiv="2410.10868",
        family="continual",
        module="jaxaccel.continual.lcia",
        cheaper="continual instruction tuning: no replay, a moving average that sets its own weight",
    ),
    Method(
        slug="fscl",
        name="Few-shot continual learning",
        paper="Few-shot Continual Learning: a Brain-inspired Approach",
        authors="L. Wang, Q. Li, Y. Zhong, J. Zhu",
        arxiv="2104.09034",
        family="continual",
        module="jaxaccel.continual.fscl",
        cheaper="few-shot tasks in sequence: few examples each, with fast and slow weights",
    ),
    Method(
        slug="atlas",
        name="aTLAS",
        paper="Knowledge Composition using Task Vectors with Learned Anisotropic Scaling",
        authors="F. Z. Zhang, P. Albert, C. Rodriguez-Opazo, A. van den Hengel, E. Abbasnejad",
        arxiv="2407.02880",
        family="continual",
        module="jaxaccel.continual.atlas",
        cheaper="adaptation: a few coefficients on existing task vectors instead of fine-tuned weights",
    ),
    Method(
        slug="dynosaur",
        name="Dynosaur",
        paper="Dynosaur: A Dynamic Growth Paradigm for Instruction-Tuning Data Curation",
        authors="D. Yin, X. Liu, F. Yin, M. Zhong, H. Bansal, J. Han, K.-W. Chang",
        arxiv="2305.14327",
        family="curation",
        module="jaxaccel.curation.dynosaur",
        cheaper="instruction data: a language model reads only metadata, annotations come from existing datasets",
    ),
    Method(
        slug="infinity_instruct",
        name="InfinityInstruct-Subject",
        paper=(
            "Scaling Towards the Information Boundary of Instruction Set: InfinityInstruct-Subject Technical Report"
        ),
        authors="L. Du, H. Zhao, Y. Ju, T. Pan",
        arxiv="2507.06968",
        family="curation",
        module="jaxaccel.curation.infinity_instruct",
        cheaper="instruction data: grows where information is missing instead of everywhere",
    ),
    Method(
        slug="gain_rl",
        name="GAIN-RL",
        paper="Angles Don't Lie: Unlocking Training-Efficient RL Through the Model's Own Signals",
        authors="Q. Wang, J. Ke, H. Ye, Y. Lin, Y. Fu, J. Zhang, K. Keutzer, C. Xu, Y. Chen",
        arxiv="2506.02281",
        family="curation",
        module="jaxaccel.curation.gain_rl",
        cheaper="RL post-training: fewer wasted rollouts, prompts ordered by angles between hidden states",
    ),
    Method(
        slug="sft_guide",
        name="SFT guide",
        paper="Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs",
        authors="Pareja, Nayak, Wang, Killamsetty, Sudalairaj, Zhao, Han, Bhandwaldar, Xu, Xu, Han, Inglis, Srivastava",
        arxiv="2412.13337",
        family="posttraining",
        module="jaxaccel.posttraining.sft",
        cheaper="fine-tuning small language models: one phase, and bad runs are stopped early",
    ),
    Method(
        slug="scalerl",
        name="ScaleRL",
        paper="The Art of Scaling Reinforcement Learning Compute for LLMs",
        authors="Khatri, Madaan, Tiwari, Bansal, Duvvuri, Zaheer, Dhillon, Brandfonbrener, Agarwal",
        arxiv="2510.13786",
        family="posttraining",
        module="jaxaccel.posttraining.scalerl",
        cheaper="RL at scale: the end of a run is predicted from its first half",
    ),
    Method(
        slug="performance_prediction",
        name="Learning-curve prediction",
        paper="Accelerating Neural Architecture Search using Performance Prediction",
        authors="B. Baker, O. Gupta, R. Raskar, N. Naik",
        arxiv="1705.10823",
        family="forecasting",
        module="jaxaccel.forecasting.learning_curves",
        cheaper="architecture and hyper-parameter search: unpromising runs are stopped early",
    ),
    Method(
        slug="metainf",
        name="MetaInf",
        paper="Meta-Learning for Speeding Up Large Model Inference in Decentralized Environments",
        authors="Y. Du, Z. Wang, A. Farhan, C. Angione, H. Yang, F. Johnston, "
        "J. P. Buban, P. Colangelo, Y. Zhao, Y. Yang",
        arxiv="2410.21340",
        family="forecasting",
        module="jaxaccel.forecasting.metainf",
        cheaper="choosing a method: advice from recorded runs instead of trying every method",
    ),
    Method(
        slug="gbrl",
        name="GBRL",
        paper="Gradient Boosting Reinforcement Learning",
        authors="Fuhrer, Tessler, Dalal",
        arxiv="2407.08250",
        family="boosting",
        module="jaxaccel.boosting.gbrl",
        cheaper="RL on tabular observations: boosted trees as policy and value, with a cheap histogram tree builder",
        status="done",
        experiments=("gbrl", "trees"),
    ),
    Method(
        slug="gbnn",
        name="GBNN",
        paper="Sequential Training of Neural Networks with Gradient Boosting",
        authors="Emami, Martinez-Munoz",
        arxiv="1909.12098",
        family="boosting",
        module="jaxaccel.boosting.gbnn",
        cheaper="inference of a shallow network: its last units can be dropped on the fly",
        status="done",
        experiments=("gbnn",),
    ),
    Method(
        slug="unlearnable",
        name="Bayes-error unlearnable examples",
        paper="Towards Provably Unlearnable Examples via Bayes Error Optimisation",
        authors="R. Zhang, J. Sun, E.-P. Lim, P. Zhang",
        arxiv="2511.08191",
        family="robustness",
        module="jaxaccel.robustness.unlearnable",
        cheaper="judging data: how much a sample is worth to training, measured by making it worthless",
    ),
    Method(
        slug="gpicl",
        name="GPICL",
        paper="General-Purpose In-Context Learning by Meta-Learning Transformers",
        authors="Kirsch, Harrison, Sohl-Dickstein, Metz",
        arxiv="2212.04458",
        family="meta",
        module="jaxaccel.meta.gpicl",
        cheaper="learning a new task: one forward pass and no gradient steps",
    ),
    Method(
        slug="scf_density",
        name="SCF density guess",
        paper="Towards A (Universally) Transferable Acceleration Method for Density Functional Theory",
        authors="Z. Liu, Y. Ni, Z. Pu, Q. Sun, S. Liu, W. Yan",
        arxiv="2509.25724",
        family="science",
        module="jaxaccel.science.scf_density",
        cheaper="density functional theory: fewer self-consistency steps from a predicted density",
    ),
    Method(
        slug="superconductors",
        name="QSD superconductors",
        paper="Accelerating the Search for Superconductors Using Machine Learning",
        authors="S. Adiga, U. V. Waghmare",
        arxiv="2505.11964",
        family="science",
        module="jaxaccel.science.superconductors",
        cheaper="materials search: formulas screened by forests on composition alone",
    ),
    Method(
        slug="acret",
        name="ACRET",
        paper=(
            "Accelerating Dependency Graph Learning from Heterogeneous Categorical Event Streams via Knowledge Transfer"
        ),
        authors="Luo, Chen, Tang, Shrivastava, Li",
        arxiv="1708.07867",
        family="science",
        module="jaxaccel.science.acret",
        cheaper="dependency graphs: days of events instead of weeks, with knowledge from another domain's graph",
    ),
    Method(
        slug="reconresnet",
        name="ReconResNet",
        paper=(
            "ReconResNet: Regularised Residual Learning for MR Image Reconstruction "
            "of Undersampled Cartesian and Radial Data"
        ),
        authors="Chatterjee, Breitkopf, Sarasaen, Yassin, Rose, Nürnberger, Speck",
        arxiv="2103.09203",
        family="science",
        module="jaxaccel.science.kspace",
        cheaper="MRI scans: fewer measurements, repaired by one network pass and data consistency",
    ),
    Method(
        slug="covid_ultrasound",
        name="Explainable lung ultrasound",
        paper="Accelerating COVID-19 Differential Diagnosis with Explainable Ultrasound Image Analysis",
        authors="Born, Wiedemann, Brändle, Buhre, Rieck, Borgwardt",
        arxiv="2009.06116",
        family="science",
        module="jaxaccel.science.ultrasound",
        cheaper="reading ultrasound: a screening in seconds, with its evidence and a confidence",
    ),
    Method(
        slug="wysiwygan",
        name="Volume-rendering samplers (WYSIWYG)",
        paper="What You See is What You GAN: Rendering Every Pixel for High-Fidelity Geometry in 3D GANs",
        authors="Trevithick, Chan, Takikawa, Iqbal, De Mello, Chandraker, Ramamoorthi, Nagano",
        arxiv="2401.02411",
        family="science",
        module="jaxaccel.science.volume_rendering",
        cheaper="neural volume rendering: fewer depth samples per ray",
    ),
    Method(
        slug="geb",
        name="GEB-1.3B",
        paper="GEB-1.3B: Open Lightweight Large Language Model",
        authors="Wu, Zhu, Shen, Lu",
        arxiv="2406.09900",
        family="models",
        module="jaxaccel.models.geb",
        cheaper="language models on a CPU: a small decoder, and pre-training in small batches without spikes",
        status="done",
        experiments=("geb",),
    ),
)
"""All methods, ordered by family."""


def get(slug: str) -> Method:
    """Return the method called ``slug``.

    Raises:
        ValueError: if there is none, naming the nearest slug.

    >>> get("exadam").name
    'EXAdam'
    """
    by_slug = {method.slug: method for method in METHODS}
    if slug in by_slug:
        return by_slug[slug]
    near = difflib.get_close_matches(str(slug), by_slug, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(sorted(by_slug))}"
    raise ValueError(f"unknown method {slug!r}: {hint}")


def by_family() -> dict[str, tuple[Method, ...]]:
    """Group the methods by family, in the order of `FAMILIES`.

    >>> [method.slug for method in by_family()["attention"]]
    ['local_linear_attention', 'kinetics']
    """
    return {family: tuple(m for m in METHODS if m.family == family) for family in FAMILIES}


def bibtex(method: Method) -> str:
    """Render a BibTeX entry for the paper of ``method``; authors are as complete as the catalogue has them.

    >>> print(bibtex(get("exadam")))
    @misc{exadam,
      title         = {{EXAdam: The Power of Adaptive Cross-Moments}},
      author        = {Ahmed M. Adly},
      year          = {2024},
      eprint        = {2412.20302},
      archivePrefix = {arXiv},
      url           = {https://arxiv.org/abs/2412.20302}
    }
    """
    fields = {
        "title": f"{{{method.paper}}}",  # the second pair of braces keeps the title's capitals
        "author": method.authors.replace(", ", " and "),
        "year": str(method.year),
        "eprint": method.arxiv,
        "archivePrefix": "arXiv",
        "url": method.url,
    }
    lines = ",\n".join(f"  {key:<13} = {{{value}}}" for key, value in fields.items())
    return f"@misc{{{method.slug},\n{lines}\n}}"
