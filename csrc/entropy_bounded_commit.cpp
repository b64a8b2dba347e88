// What a denoising step commits, on the CPU. A row's masked positions go into a heap, and only as many are taken out of it in order as
// are committed, plus one.
#include "entropy_bounded_commit.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"

namespace diffpo {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kPositionsPerThread = 1 << 15;  // at least 100 us, several times what starting a thread costs

struct Candidate {
    double proxy;
    int64_t position;
};

// For a heap with the most certain candidate on top.
bool less_certain(const Candidate& a, const Candidate& b) {
    return a.proxy > b.proxy || (a.proxy == b.proxy && a.position > b.position);
}

double load(const FloatRows& values, int64_t row, int64_t column) {
    const int64_t i = row * values.row_stride + column;
    return values.type == FloatType::float32 ? static_cast<const float*>(values.data)[i] : static_cast<const double*>(values.data)[i];
}

double nan_to_infinity(double value) { return std::isnan(value) ? kInfinity : value; }

// The costs accepted so far, and whether one more fits.
class Prefix {
public:
    Prefix(bool ranked, double gamma) : ranked_(ranked), gamma_(gamma) {}

    bool accept(double cost) {
        excess_ += std::min(cost, highest_);  // sum - max without its cancellation
        highest_ = std::max(cost, highest_);
        ++count_;
        const double price = highest_ == kInfinity ? kInfinity : ranked_ ? static_cast<double>(count_ + 1) * cost : excess_;
        return count_ == 1 || price <= gamma_;
    }

private:
    bool ranked_;
    double gamma_;
    double excess_ = 0, highest_ = 0;
    int64_t count_ = 0;
};

void commit_position(const EntropyBoundedCommitArguments& a, int64_t row, int64_t position) {
    a.committed[row * a.length + position] = true;
    a.tokens.data[row * a.tokens.row_stride + position] = a.proposal.data[row * a.proposal.row_stride + position];
    if (a.commit_step.data) a.commit_step.data[row * a.commit_step.row_stride + position] = a.nfe[row];
    if (a.logprob.data)
        std::memcpy(a.logprob.data + row * a.logprob.row_stride + position * a.logprob_size,
                    a.proposal_logprob.data + row * a.proposal_logprob.row_stride + position * a.logprob_size, a.logprob_size);
}

void commit_row(const EntropyBoundedCommitArguments& a, int64_t row, std::vector<Candidate>& heap) {
    const int64_t start = a.start ? a.start[row] : a.start_of_all, end = a.end ? a.end[row] : a.end_of_all;
    const int64_t first = std::max<int64_t>(start, 0), last = std::min(end, a.length);
    const bool promise_kept = last - first <= a.max_window;
    int64_t* tokens = a.tokens.data + row * a.tokens.row_stride;

    std::memset(a.committed + row * a.length, 0, a.length);
    heap.clear();
    for (int64_t l = first; l < (promise_kept ? last : first + a.max_window); ++l)
        if (tokens[l] == a.mask_id) heap.push_back({nan_to_infinity(load(a.proxy, row, l)), l});
    std::make_heap(heap.begin(), heap.end(), less_certain);
    if (a.nfe && !heap.empty()) ++a.nfe[row];

    Prefix prefix(a.ranked, a.gamma.data ? load(a.gamma, row, 0) : a.gamma_of_all);
    bool full = promise_kept;
    while (!heap.empty()) {
        const int64_t position = heap.front().position;
        if (!prefix.accept(std::max(nan_to_infinity(load(a.entropy, row, position)), 0.0))) {
            full = false;
            break;
        }
        std::pop_heap(heap.begin(), heap.end(), less_certain);
        heap.pop_back();
        commit_position(a, row, position);
        full &= tokens[position] != a.mask_id;
    }
    if (a.advance && full) {
        a.start[row] = last;
        a.end[row] = std::min(2 * end - start, a.length);
    }
}

}  // namespace

void entropy_bounded_commit_cpu(const EntropyBoundedCommitArguments& a, int threads) {
    parallel_for(a.rows, std::min<int64_t>(threads, a.rows * a.max_window / kPositionsPerThread), [&](int64_t begin, int64_t end) {
        std::vector<Candidate> heap;
        for (int64_t row = begin; row < end; ++row) commit_row(a, row, heap);
    });
}

}  // namespace diffpo
