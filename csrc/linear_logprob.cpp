// linear_logprob's passes on the CPU: a tile of a row is widened to float32 in L1, worked on there, and for the gradient written back.
#include "linear_logprob.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "chunk_kernels.h"
#include "parallel.h"

namespace diffpo {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int kTile = 4096;  // columns: 16 KB in float32, which stay in L1

int64_t tiles(const LogitsChunk& a) { return (a.columns + kTile - 1) / kTile; }

// kTile columns of one row.
class Tile {
public:
    Tile(const LogitsChunk& a, int64_t index)
        : a_(a), begin_(index * kTile), n_(static_cast<int>(std::min<int64_t>(kTile, a.columns - begin_))) {}

    // In float32 with the bias, padded with -inf to a multiple of kLanes.
    float* read(int64_t row) {
        const int64_t offset = row * a_.columns + begin_;
        if (a_.dtype == Dtype::float32) {
            std::memcpy(x_, static_cast<const float*>(a_.logits) + offset, n_ * sizeof(float));
        } else {
            const auto widen = a_.dtype == Dtype::bfloat16 ? chunk_kernels().widen_bfloat16 : chunk_kernels().widen_float16;
            widen(static_cast<const uint16_t*>(a_.logits) + offset, n_, x_);
        }
        if (a_.bias)
            for (int i = 0; i < n_; ++i) x_[i] += a_.bias[begin_ + i];
        std::fill(x_ + n_, x_ + size(), kMinusInfinity);
        return x_;
    }

    // As `read`, without the copy where the logits are already what it would give; to be read only.
    const float* view(int64_t row) {
        const bool as_stored = a_.dtype == Dtype::float32 && !a_.bias && n_ % kLanes == 0;
        return as_stored ? static_cast<const float*>(a_.logits) + row * a_.columns + begin_ : read(row);
    }

    void write(int64_t row) const {
        const int64_t offset = row * a_.columns + begin_;
        if (a_.dtype == Dtype::float32) {
            std::memcpy(static_cast<float*>(a_.logits) + offset, x_, n_ * sizeof(float));
        } else {
            const auto narrow = a_.dtype == Dtype::bfloat16 ? chunk_kernels().narrow_bfloat16 : chunk_kernels().narrow_float16;
            narrow(x_, n_, static_cast<uint16_t*>(a_.logits) + offset);
        }
    }

    void add_to(float* row) const {
        for (int i = 0; i < n_; ++i) row[begin_ + i] += x_[i];
    }

    // Where a token stands, or -1 if the tile does not hold it.
    int64_t find(int64_t token) const {
        const int64_t i = token - a_.first_column - begin_;
        return i >= 0 && i < n_ ? i : -1;
    }

    const char* after(int64_t row) const {
        return static_cast<const char*>(a_.logits) + (row * a_.columns + begin_ + n_) * entry_size();
    }

    int entry_size() const { return a_.dtype == Dtype::float32 ? 4 : 2; }

    int size() const { return (n_ + kLanes - 1) / kLanes * kLanes; }

private:
    const LogitsChunk& a_;
    const int64_t begin_;
    const int n_;
    alignas(64) float x_[kTile];
};

// 1 / T, kept finite so that 0 * scale is 0, and positive so that -inf * scale is -inf.
float scale_of(float temperature) {
    using limits = std::numeric_limits<float>;
    return std::min(std::max(1.0f / temperature, limits::min()), limits::max());
}

// A row so far: sum of exp((x - max) scale) and of (x - max) scale exp((x - max) scale). max is NaN once the row is spoilt.
struct RowSums {
    float max = kMinusInfinity;
    double sum = 0, weighted = 0;

    // `next`: what is read after it, fetched meanwhile.
    void add(const float* x, int n, float scale, const char* next, int entry_size) {
        const float tile_max = chunk_kernels().max(x, n);
        if (tile_max == kMinusInfinity && std::none_of(x, x + n, [](float v) { return std::isnan(v); })) return;
        if (!std::isfinite(tile_max)) max = kNaN;
        if (std::isnan(max)) return;
        float tile_sum, tile_weighted;
        chunk_kernels().exp_sums(x, n, tile_max, scale, &tile_sum, &tile_weighted, next, entry_size);
        if (tile_max > max) shift_to(tile_max, scale);
        const double gap = (static_cast<double>(tile_max) - max) * scale, factor = gap == 0 ? 1.0 : std::exp(gap);
        sum += factor * tile_sum;
        weighted += factor * tile_weighted + (factor > 0 ? factor * gap * tile_sum : 0.0);
    }

private:
    void shift_to(float new_max, float scale) {
        const double gap = (static_cast<double>(max) - new_max) * scale;
        if (sum > 0) {
            const double factor = std::exp(gap);
            weighted = factor > 0 ? factor * (weighted + gap * sum) : 0.0;
            sum *= factor;
        }
        max = new_max;
    }
};

void row_statistics(const LogitsChunk& a, int64_t row) {
    const float scale = scale_of(a.temperature[row]);
    RowSums sums;
    float at_target = kMinusInfinity;
    for (int64_t t = 0; t < tiles(a); ++t) {
        Tile tile(a, t);
        const float* const x = tile.view(row);
        sums.add(x, tile.size(), scale, tile.after(row), tile.entry_size());
        if (const int64_t i = tile.find(a.target[row]); i >= 0) at_target = x[i];
    }
    if (!std::isfinite(sums.max) || std::isnan(sums.sum)) {
        a.logprob[row] = a.entropy[row] = a.max[row] = a.log_sum[row] = kNaN;
        return;
    }
    const double log_sum = std::log(sums.sum);
    a.logprob[row] = static_cast<float>((static_cast<double>(at_target) - sums.max) * scale - log_sum);
    a.entropy[row] = static_cast<float>(std::max(0.0, log_sum - sums.weighted / sums.sum));
    a.max[row] = sums.max;
    a.log_sum[row] = static_cast<float>(log_sum);
}

}  // namespace

void linear_logprob_statistics_cpu(const LogitsChunk& a, int threads) {
    const int64_t wanted = std::min<int64_t>(threads, a.rows * a.columns / kWorkPerThread);
    parallel_for(a.rows, wanted, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) row_statistics(a, row);
    });
}

void linear_logprob_gradient_cpu(const LogitsChunk& a, const float* by_logprob, const float* by_entropy, float* bias_gradient,
                                 int threads) {
    const int64_t per_group = tiles(a), groups = (a.rows + kRowGroup - 1) / kRowGroup;
    const int64_t wanted = std::min<int64_t>(threads, a.rows * a.columns / kWorkPerThread);
    if (bias_gradient) std::fill(bias_gradient, bias_gradient + groups * a.columns, 0.0f);

    // By tile and group of rows, so that the sums over rows do not depend on the number of threads.
    parallel_for(groups * per_group, wanted, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            Tile tile(a, item % per_group);
            const int64_t group = item / per_group;
            for (int64_t row = group * kRowGroup; row < std::min(a.rows, (group + 1) * kRowGroup); ++row) {
                const float scale = scale_of(a.temperature[row]);
                const RowGradient g{a.max[row], scale, a.log_sum[row], by_entropy ? a.entropy[row] : 0.0f, by_logprob[row] * scale,
                                    by_entropy ? by_entropy[row] * scale : 0.0f};
                float* const x = tile.read(row);
                const int64_t i = tile.find(a.target[row]);
                const float logit = i < 0 ? 0.0f : x[i];
                chunk_kernels().gradient(x, tile.size(), g);
                if (i >= 0) {  // 1 - p from expm1: exact where p rounds to 1
                    float log_p = (logit - g.max) * scale - g.log_sum;
                    log_p = log_p > 0.0f ? 0.0f : log_p < -200.0f ? -200.0f : log_p;  // a NaN stays
                    const float missing = -std::expm1(log_p);
                    x[i] = missing * g.by_logprob - (1.0f - missing) * (g.by_entropy * (log_p + g.entropy));
                }
                if (bias_gradient) tile.add_to(bias_gradient + group * a.columns);
                tile.write(row);
            }
        }
    });
}

}  // namespace diffpo
