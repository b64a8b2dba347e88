"""The diagnostics of surrogate_loss: their names, their order in the one vector the fused backends fill, and the histogram's bins."""

from torch import Tensor

# The histogram has one bin around each power of two: bin i counts edge[i - 1] <= weight < edge[i]; the first and the last are open.
WEIGHT_EDGES = tuple(2.0 ** (octave + 0.5) for octave in range(-5, 5))
HISTOGRAM_SIZE = len(WEIGHT_EDGES) + 1

SCALARS = (
    "ratio_mean",
    "ratio_max",
    "clip_fraction",
    "weight_mean",
    "weight_max",
    "weight_cap_fraction",
    "ess",
    "kl",
)
HISTOGRAM = "weight_histogram"
BY_BIN = (
    "bin/tokens",
    "bin/weight_mean",
    "bin/ess",
    "bin/weight_cap_fraction",
    "bin/surrogate_kl",
    "bin/ess_uncapped",
)
HISTOGRAM_BY_BIN = "bin/weight_histogram"
MAX_BINS = 128  # a row's sums for every bin stay in registers


def packed_size(bins: int) -> int:
    """Entries of the vector: the scalars, the histogram, each name of BY_BIN with its `bins` values, then the histogram of each bin."""
    return len(SCALARS) + HISTOGRAM_SIZE + (len(BY_BIN) + HISTOGRAM_SIZE) * bins


def unpack(packed: Tensor, bins: int) -> dict[str, Tensor]:
    """Views of the vector by name; the scalars without a dimension."""
    sizes = [len(SCALARS), HISTOGRAM_SIZE, len(BY_BIN) * bins, HISTOGRAM_SIZE * bins]
    scalars, histogram, by_bin, histogram_by_bin = packed.split(sizes)
    named = dict(zip(SCALARS, scalars.unbind(), strict=True)) | {HISTOGRAM: histogram}
    if bins:
        named |= dict(zip(BY_BIN, by_bin.view(len(BY_BIN), bins).unbind(), strict=True))
        named[HISTOGRAM_BY_BIN] = histogram_by_bin.view(bins, HISTOGRAM_SIZE)
    return named
