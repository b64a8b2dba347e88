// surrogate_loss on the CPU. Rows are taken in chunks of fixed size; each chunk leaves its sums, and these are added in order.
#include "surrogate_loss.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace diffpo {
namespace {

constexpr int64_t kChunkTokens = 1 << 14;
constexpr int64_t kTokensPerThread = 1 << 17;  // several times what starting a thread costs
constexpr int kHistogram = 11;                 // HISTOGRAM_SIZE in diagnostics.py

using Histogram = std::array<int64_t, kHistogram>;

void add_to(Histogram& total, const Histogram& other) {
    for (int i = 0; i < kHistogram; ++i) total[i] += other[i];
}

struct BinSums {
    int64_t count = 0, capped = 0;
    double weight = 0, squares = 0, surrogate_gap = 0, uncapped = 0, uncapped_squares = 0;
    Histogram histogram{};
};

struct Sums {
    explicit Sums(int bins) : of_bin(bins) {}

    int64_t count = 0, cut = 0, capped = 0;
    double objective = 0, kl = 0, ratio = 0, weight = 0, squares = 0;
    double largest_ratio = 0, largest_weight = 0;
    Histogram histogram{};
    std::vector<BinSums> of_bin;

    void add(const Sums& other) {
        count += other.count;
        cut += other.cut;
        capped += other.capped;
        objective += other.objective;
        kl += other.kl;
        ratio += other.ratio;
        weight += other.weight;
        squares += other.squares;
        largest_ratio = std::max(largest_ratio, other.largest_ratio);
        largest_weight = std::max(largest_weight, other.largest_weight);
        add_to(histogram, other.histogram);
        for (size_t b = 0; b < of_bin.size(); ++b) {
            of_bin[b].count += other.of_bin[b].count;
            of_bin[b].capped += other.of_bin[b].capped;
            of_bin[b].weight += other.of_bin[b].weight;
            of_bin[b].squares += other.of_bin[b].squares;
            of_bin[b].surrogate_gap += other.of_bin[b].surrogate_gap;
            of_bin[b].uncapped += other.of_bin[b].uncapped;
            of_bin[b].uncapped_squares += other.of_bin[b].uncapped_squares;
            add_to(of_bin[b].histogram, other.of_bin[b].histogram);
        }
    }
};

// exp of a bounded exponent, and its derivative, which is 0 where the bound holds. A NaN stays NaN.
template <typename T>
struct BoundedExp {
    static constexpr T kLargest = 60;
    T value, slope;

    explicit BoundedExp(T x) {
        const bool inside = x >= -kLargest && x <= kLargest;
        value = std::exp(x > kLargest ? kLargest : x < -kLargest ? -kLargest : x);
        slope = inside ? value : 0;
    }
};

// The histogram's bin: log2 of the weight to the nearest whole number, the middle bin at 0.
template <typename T>
int octave(T log_weight) {
    const T place = log_weight * static_cast<T>(1.4426950408889634) + static_cast<T>(kHistogram / 2 + 0.5);
    return place >= 1 ? static_cast<int>(std::min<T>(place, kHistogram - 1)) : 0;
}

template <typename T>
void process_row(const SurrogateLossArguments<T>& a, int64_t row, Sums& sums) {
    const int64_t begin = row * a.length, end = begin + a.length;
    const T high = static_cast<T>(1 + a.clip), low = static_cast<T>(1 - a.clip), cap = static_cast<T>(a.weight_cap);
    const T beta = static_cast<T>(a.kl_coefficient);
    const int64_t count = std::count(a.mask + begin, a.mask + end, true);
    const double share = a.by_sequence ? 1.0 / static_cast<double>(std::max<int64_t>(count, 1) * a.rows) : 1.0;
    double objective = 0, kl = 0;

    for (int64_t i = begin; i < end; ++i) {
        if (!a.mask[i]) {  // nothing else of this token is read
            a.gradient[i] = 0;
            continue;
        }
        const BoundedExp<T> ratio(a.logprob[i] - a.old[i]);
        const T log_weight = a.behaviour ? a.old[i] - a.behaviour[i] : 0;
        const T uncapped = BoundedExp<T>(log_weight).value;
        T weight = 1;
        bool capped = false;
        if (a.behaviour && a.importance_correction) {
            weight = uncapped;
            capped = weight >= cap;
            if (capped) weight = cap;
        }

        const T advantage = a.advantage[a.advantage_per_token ? i : row];
        const bool too_high = advantage > 0 && ratio.value > high, too_low = advantage < 0 && ratio.value < low;
        objective += weight * (too_high ? high : too_low ? low : ratio.value) * advantage;
        T gradient = too_high || too_low ? 0 : -(weight * advantage * ratio.slope);
        if (a.reference) {
            const T gap = a.reference[i] - a.logprob[i];
            const BoundedExp<T> inverse(gap);
            kl += inverse.value - gap - 1;
            if (beta > 0) gradient += beta * (1 - inverse.slope);
        }
        a.gradient[i] = static_cast<T>(share) * gradient;

        sums.cut += too_high || too_low;
        sums.capped += capped;
        sums.ratio += ratio.value;
        sums.weight += weight;
        sums.squares += static_cast<double>(weight) * weight;
        sums.largest_ratio = std::max<double>(sums.largest_ratio, ratio.value);
        sums.largest_weight = std::max<double>(sums.largest_weight, weight);
        if (!std::isnan(log_weight)) ++sums.histogram[octave(log_weight)];
        if (a.step_bin && a.step_bin[i] >= 0 && a.step_bin[i] < a.bins) {
            BinSums& bin = sums.of_bin[a.step_bin[i]];
            ++bin.count;
            bin.capped += capped;
            bin.weight += weight;
            bin.squares += static_cast<double>(weight) * weight;
            bin.surrogate_gap -= log_weight;
            if (!std::isnan(log_weight)) ++bin.histogram[octave(log_weight)];
            bin.uncapped += uncapped;
            bin.uncapped_squares += static_cast<double>(uncapped) * uncapped;
        }
    }
    sums.count += count;
    sums.objective += share * objective;
    sums.kl += share * kl;
}

double mean(double sum, int64_t count) { return count == 0 ? 0.0 : sum / static_cast<double>(count); }

double effective_sample_size(double sum, double squares, int64_t count) {
    return squares == 0 ? 0.0 : sum * sum / (static_cast<double>(count) * squares);
}

template <typename T>
void finish(const SurrogateLossArguments<T>& a, const Sums& sums) {
    const double factor = a.by_sequence ? 1.0 : 1.0 / static_cast<double>(std::max<int64_t>(sums.count, 1));
    *a.factor = static_cast<T>(factor);
    *a.loss = static_cast<T>(factor * (a.kl_coefficient > 0 ? a.kl_coefficient * sums.kl - sums.objective : -sums.objective));

    T* out = a.diagnostics;
    const auto put = [&](double value) { *out++ = static_cast<T>(value); };
    put(mean(sums.ratio, sums.count));
    put(std::isnan(sums.ratio) ? sums.ratio : sums.largest_ratio);  // std::max drops a NaN, the sum keeps it
    put(mean(sums.cut, sums.count));
    put(mean(sums.weight, sums.count));
    put(std::isnan(sums.weight) ? sums.weight : sums.largest_weight);
    put(mean(sums.capped, sums.count));
    put(effective_sample_size(sums.weight, sums.squares, sums.count));
    put(factor * sums.kl);
    for (int64_t count : sums.histogram) put(count);
    for (const BinSums& bin : sums.of_bin) put(bin.count);
    for (const BinSums& bin : sums.of_bin) put(mean(bin.weight, bin.count));
    for (const BinSums& bin : sums.of_bin) put(effective_sample_size(bin.weight, bin.squares, bin.count));
    for (const BinSums& bin : sums.of_bin) put(mean(bin.capped, bin.count));
    for (const BinSums& bin : sums.of_bin) put(mean(bin.surrogate_gap, bin.count));
    for (const BinSums& bin : sums.of_bin) put(effective_sample_size(bin.uncapped, bin.uncapped_squares, bin.count));
    for (const BinSums& bin : sums.of_bin)
        for (int64_t count : bin.histogram) put(count);
}

}  // namespace

template <typename T>
void surrogate_loss_cpu(const SurrogateLossArguments<T>& a, int threads) {
    const int64_t rows_per_chunk = std::max<int64_t>(1, kChunkTokens / std::max<int64_t>(a.length, 1));
    const int64_t chunks = (a.rows + rows_per_chunk - 1) / rows_per_chunk;
    std::vector<Sums> of_chunk(chunks, Sums(a.bins));
    parallel_for(chunks, std::min<int64_t>(threads, a.rows * a.length / kTokensPerThread), [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            Sums sums(a.bins);
            const int64_t last = std::min(a.rows, (chunk + 1) * rows_per_chunk);
            for (int64_t row = chunk * rows_per_chunk; row < last; ++row) process_row(a, row, sums);
            of_chunk[chunk] = std::move(sums);
        }
    });
    Sums total(a.bins);
    for (const Sums& sums : of_chunk) total.add(sums);
    finish(a, total);
}

template void surrogate_loss_cpu<float>(const SurrogateLossArguments<float>&, int);
template void surrogate_loss_cpu<double>(const SurrogateLossArguments<double>&, int);

}  // namespace diffpo
