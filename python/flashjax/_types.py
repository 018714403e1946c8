"""The static half of a call."""

import dataclasses

import jax

from flashjax._layouts import SequenceLayout
from flashjax._line import Line

Arrays = dict[str, jax.Array]  # slot name -> array; an absent argument has no key


@dataclasses.dataclass(frozen=True)
class Split:
    """How sequences lie in their arrays, and how devices that hold parts of them share the work."""

    layout: SequenceLayout = dataclasses.field(default_factory=SequenceLayout)
    strategy: str = "auto"  # or one of _checks.STRATEGIES
    line: Line | None = None  # the devices whose parts the operands are, where the call already is one device's
    is_self: bool = True  # packed keys lie at the positions of their queries


@dataclasses.dataclass(frozen=True)
class Attrs:
    """Scalar attributes: the Python half of csrc/attention/attrs.def, and the implementation asked for.

    Fields are exactly int, float and bool, so that equal calls share one compiled program.
    """

    scale: float
    softcap: float = 0.0
    window_left: int = -1  # keys before the diagonal that a query sees; -1: all
    window_right: int = -1  # keys after it; -1: all; causal is 0
    top_left: bool = False
    max_seqlen_q: int = -1  # queries of a sequence past this many are outside it; -1: no bound
    max_seqlen_k: int = -1
    deterministic: bool = False
    num_splits: int = 0
    yields: bool = False  # transfers want to start beside the kernel, so it shall not keep all of a device to itself
    part: bool = False  # of keys: out and lse, which a backward is given, are of more of them
    out_only: bool = False  # of the results only out has a cotangent: what lies in `dlse` is not read
    dropout_keep: int = 256  # 256ths of the weights that are kept, where there is a dropout_seed
    shared_e: int = 0  # v is the first so many columns of k, which may stand for it; 0: an array of its own
    upstream: bool = False  # only by FlashAttention-2's kernels
    implementation: str | None = None  # one of _checks.IMPLEMENTATIONS; None: the best for the platform. Never sent
    sequence: Split = dataclasses.field(default_factory=Split)  # never sent
