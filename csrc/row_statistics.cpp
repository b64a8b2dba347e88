// Row statistics on the CPU. See row_statistics.h for the two stages.
#include "row_statistics.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>

#include "chunk_kernels.h"
#include "parallel.h"

namespace diffpo {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int kChunk = 4096;  // 16 KB in float32: a chunk stays in L1 between its two passes
constexpr int kBlock = 256;   // a draw narrows down from chunk to block to entry

struct Partial {
    float max;          // of the chunk; -inf if it has no finite entry, NaN if it holds one
    float second;       // second largest, equal to max on a tie
    float sum;          // sum of exp(x - max)
    float weighted;     // sum of (x - max) exp(x - max)
    float tempered;     // sum of exp((x - max) / T); unset where T = 0
};

// A chunk in float32, padded with -inf to a multiple of kLanes, with the banned entries at -inf.
struct Chunk {
    const float* x;
    int size;
    const char* after;  // where the next chunk of the row starts
};

class ChunkReader {
public:
    ChunkReader(const RowStatisticsArguments& a, const ChunkKernels& k) : a_(a), k_(k) {}

    // Valid until the next call. float32 chunks that need no change are not copied.
    Chunk read(int64_t row, int64_t chunk) {
        const int64_t begin = chunk * kChunk;
        const int n = static_cast<int>(std::min<int64_t>(kChunk, a_.vocabulary - begin));
        const int size = (n + kLanes - 1) / kLanes * kLanes;
        const int64_t offset = row * a_.row_stride + begin;
        const int64_t* banned_end = a_.banned + a_.banned_count;
        const int64_t* banned = std::lower_bound(a_.banned, banned_end, begin);
        const char* after = static_cast<const char*>(a_.logits) + (offset + n) * entry_size();
        const bool has_banned = banned != banned_end && *banned < begin + n;

        if (a_.dtype == Dtype::float32) {
            const float* x = static_cast<const float*>(a_.logits) + offset;
            if (size == n && !has_banned) return {x, size, after};
            std::memcpy(buffer_, x, n * sizeof(float));
        } else {
            const uint16_t* x = static_cast<const uint16_t*>(a_.logits) + offset;
            (a_.dtype == Dtype::bfloat16 ? k_.widen_bfloat16 : k_.widen_float16)(x, n, buffer_);
        }
        std::fill(buffer_ + n, buffer_ + size, kMinusInfinity);
        for (; banned != banned_end && *banned < begin + n; ++banned) buffer_[*banned - begin] = kMinusInfinity;
        return {buffer_, size, after};
    }

    int entry_size() const { return a_.dtype == Dtype::float32 ? 4 : 2; }

private:
    const RowStatisticsArguments& a_;
    const ChunkKernels& k_;
    alignas(64) float buffer_[kChunk];
};

float temperature_of(const RowStatisticsArguments& a, int64_t row) { return a.temperature ? a.temperature[row] : 0.0f; }

// 1 / T, kept finite so that 0 * scale is 0, and positive so that -inf * scale is -inf.
float scale_of(float temperature) { return std::min(std::max(1.0f / temperature, std::numeric_limits<float>::min()), 1e30f); }

Partial summarise(const Chunk& chunk, float temperature, int entry_size, const ChunkKernels& k) {
    Partial p{};
    k.top_two(chunk.x, chunk.size, &p.max, &p.second);
    if (!std::isfinite(p.max)) {
        // Nothing to sum; but top_two passed over NaN entries.
        if (std::any_of(chunk.x, chunk.x + chunk.size, [](float x) { return std::isnan(x); })) p.max = kNaN;
        return p;
    }
    k.exp_sums(chunk.x, chunk.size, p.max, 1.0f, &p.sum, &p.weighted, chunk.after, entry_size);
    if (std::isnan(p.sum)) p.max = kNaN;
    p.tempered = p.sum;
    if (temperature > 0 && temperature != 1) p.tempered = k.exp_sum(chunk.x, chunk.size, p.max, scale_of(temperature), nullptr);
    return p;
}

// All of a row, relative to its max.
struct Whole {
    float max = kMinusInfinity, second = kMinusInfinity;
    double odds = 0;  // sum of exp(x - max) in the chunks but argmax_chunk
    double weighted = 0;
    int64_t argmax_chunk = 0;  // the first that holds max
};

Whole merge(const Partial* partial, int64_t chunks) {
    Whole whole;
    for (int64_t c = 0; c < chunks; ++c) {
        const Partial& p = partial[c];
        if (!(p.max < std::numeric_limits<float>::infinity())) {  // NaN or +inf
            whole.max = kNaN;
            return whole;
        }
        if (p.max > whole.max) {
            whole.second = std::max(whole.max, p.second);
            whole.max = p.max;
            whole.argmax_chunk = c;
        } else {
            whole.second = std::max(whole.second, p.max);
        }
    }
    for (int64_t c = 0; c < chunks; ++c) {
        const Partial& p = partial[c];
        if (p.max == kMinusInfinity) continue;
        const double gap = static_cast<double>(p.max) - whole.max, factor = gap == 0 ? 1.0 : std::exp(gap);
        if (c != whole.argmax_chunk) whole.odds += factor * p.sum;
        whole.weighted += factor * (p.weighted + gap * p.sum);
    }
    return whole;
}

// The unit that a cumulative sum of weights takes above the threshold, and the sum ahead of it. Where rounding leaves the sum short of
// the threshold it is the last unit with a positive weight; a unit of weight zero is never chosen. One weight must be positive.
struct Choice {
    int64_t unit;
    double before;
};

template <typename Weight>
Choice walk(int64_t count, double threshold, const Weight& weight) {
    double before = 0;
    for (int64_t unit = 0; unit < count; ++unit) {
        const double after = before + weight(unit);
        if (after > threshold) return {unit, before};
        before = after;
    }
    int64_t last = count - 1;
    while (last > 0 && !(weight(last) > 0)) --last;
    return {last, before - weight(last)};
}

struct Draw {
    int64_t token;
    double gap;  // x - max
    double logprob;
};

Draw draw(int64_t row, int64_t chunks, const Partial* partial, float row_max, float temperature, double uniform, ChunkReader& reader,
          const ChunkKernels& k) {
    const float scale = scale_of(temperature);
    const auto weight = [&](int64_t c) {
        const double gap = static_cast<double>(partial[c].max) - row_max;
        return partial[c].max == kMinusInfinity ? 0.0 : std::exp(gap * scale) * partial[c].tempered;
    };
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += weight(c);

    const double threshold = uniform * total;
    const Choice chosen = walk(chunks, threshold, weight);
    const Chunk chunk = reader.read(row, chosen.unit);

    // Inside the chunk, weights are relative to its own max: none is lost to underflow that stage 1 had counted.
    const float chunk_max = partial[chosen.unit].max;
    const double left = (threshold - chosen.before) * std::exp((static_cast<double>(row_max) - chunk_max) * scale);
    const auto size_of = [&](int64_t block) { return std::min<int>(kBlock, chunk.size - static_cast<int>(block) * kBlock); };
    const int64_t blocks = (chunk.size + kBlock - 1) / kBlock;
    const Choice block = blocks == 1 ? Choice{0, 0} : walk(blocks, left, [&](int64_t b) {
        return k.exp_sum(chunk.x + b * kBlock, size_of(b), chunk_max, scale, nullptr);
    });
    float terms[kBlock];
    k.exp_sum(chunk.x + block.unit * kBlock, size_of(block.unit), chunk_max, scale, terms);
    const Choice entry = walk(size_of(block.unit), left - block.before, [&](int64_t i) { return terms[i]; });

    const int64_t index = block.unit * kBlock + entry.unit;
    const double gap = static_cast<double>(chunk.x[index]) - row_max;
    return {chosen.unit * kChunk + index, gap, gap * scale - std::log(total)};
}

// The sum of exp(x - max) over a chunk but its largest entry, at `index`: that one is 1 and would swallow small ones.
double sum_of_others(const Chunk& chunk, int index, float max, const ChunkKernels& k) {
    double sum = 0;
    for (int begin = 0; begin < chunk.size; begin += kBlock) {
        const int size = std::min(kBlock, chunk.size - begin);
        if (index < begin || index >= begin + size) {
            sum += k.exp_sum(chunk.x + begin, size, max, 1.0f, nullptr);
            continue;
        }
        float terms[kBlock];
        k.exp_sum(chunk.x + begin, size, max, 1.0f, terms);
        terms[index - begin] = 0;
        sum = std::accumulate(terms, terms + size, sum);
    }
    return sum;
}

void finish_row(const RowStatisticsArguments& a, int64_t row, int64_t chunks, const Partial* partial, ChunkReader& reader,
                const ChunkKernels& k) {
    const Whole whole = merge(partial, chunks);
    a.valid[row] = std::isfinite(whole.max);
    if (!a.valid[row]) {
        a.token[row] = -1;
        for (float* field : {a.logprob, a.entropy, a.confidence, a.top1, a.top2, a.odds, a.lse}) field[row] = kNaN;
        return;
    }
    const Chunk best = reader.read(row, whole.argmax_chunk);
    const int argmax = k.first_equal(best.x, best.size, whole.max);
    const double odds = whole.odds + sum_of_others(best, argmax, whole.max, k), sum = 1 + odds, log_sum = std::log1p(odds);
    a.entropy[row] = static_cast<float>(std::max(0.0, log_sum - whole.weighted / sum));
    a.top1[row] = static_cast<float>(1 / sum);
    a.top2[row] = static_cast<float>(std::exp(static_cast<double>(whole.second) - whole.max) / sum);
    a.odds[row] = static_cast<float>(odds);
    a.lse[row] = static_cast<float>(whole.max + log_sum);

    const float temperature = temperature_of(a, row);
    if (temperature > 0) {
        const Draw drawn = draw(row, chunks, partial, whole.max, temperature, a.uniform[row], reader, k);
        a.token[row] = drawn.token;
        a.logprob[row] = static_cast<float>(drawn.logprob);
        a.confidence[row] = static_cast<float>(std::exp(drawn.gap) / sum);
    } else {
        a.token[row] = whole.argmax_chunk * kChunk + argmax;
        a.logprob[row] = static_cast<float>(-log_sum);
        a.confidence[row] = a.top1[row];
    }
}

}  // namespace

void row_statistics_cpu(const RowStatisticsArguments& a, int threads) {
    const ChunkKernels& k = chunk_kernels();
    const int64_t chunks = (a.vocabulary + kChunk - 1) / kChunk;
    const std::unique_ptr<Partial[]> partial(new Partial[a.rows * chunks]);
    const int64_t wanted = std::min<int64_t>(threads, a.rows * a.vocabulary / kWorkPerThread);

    // By chunk, so that few long rows still use every thread.
    parallel_for(a.rows * chunks, wanted, [&](int64_t begin, int64_t end) {
        ChunkReader reader(a, k);
        for (int64_t i = begin; i < end; ++i)
            partial[i] = summarise(reader.read(i / chunks, i % chunks), temperature_of(a, i / chunks), reader.entry_size(), k);
    });
    // A row's second stage costs at most about as much as four chunks.
    parallel_for(a.rows, std::min<int64_t>(wanted, a.rows * 4 * kChunk / kWorkPerThread), [&](int64_t begin, int64_t end) {
        ChunkReader reader(a, k);
        for (int64_t row = begin; row < end; ++row) finish_row(a, row, chunks, partial.get() + row * chunks, reader, k);
    });
}

}  // namespace diffpo
