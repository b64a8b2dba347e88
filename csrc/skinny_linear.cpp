// A matrix product bound by reading the weights: each is read from memory once, in order, and used for every row while it is in the cache.
// Libraries lay the whole matrix out anew first, which pays only with many rows.
#include "skinny_linear.h"

#include <algorithm>
#include <vector>

#include "chunk_kernels.h"
#include "parallel.h"

namespace diffpo {
namespace {

// Rows of hidden as columns, padded with zeros: [depth, width].
struct Group {
    int64_t first;
    int columns, width;
    std::vector<float> hidden;
};

Group group_from(const SkinnyLinearArguments& a, int64_t first) {
    Group group{first, static_cast<int>(std::min<int64_t>(kLinearColumns, a.rows - first)), 0, {}};
    group.width = group.columns <= kLanes ? kLanes : kLinearColumns;
    group.hidden.resize(a.depth * group.width);
    for (int n = 0; n < group.columns; ++n) {
        const float* row = a.hidden + (first + n) * a.hidden_row_stride;
        for (int64_t d = 0; d < a.depth; ++d) group.hidden[d * group.width + n] = row[d * a.hidden_column_stride];
    }
    return group;
}

}  // namespace

void skinny_linear_cpu(const SkinnyLinearArguments& a, int threads) {
    const auto linear = chunk_kernels().linear;
    std::vector<Group> groups;
    for (int64_t first = 0; first < a.rows; first += kLinearColumns) groups.push_back(group_from(a, first));

    const int64_t blocks = (a.vocabulary + kLinearRows - 1) / kLinearRows;
    const int64_t work = a.vocabulary * a.depth * ((a.rows + kLanes - 1) / kLanes);  // a step of it costs what a logit does elsewhere
    parallel_for(blocks, std::min<int64_t>(threads, work / kWorkPerThread), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            const int64_t v = block * kLinearRows;
            const int rows = static_cast<int>(std::min<int64_t>(kLinearRows, a.vocabulary - v));
            for (const Group& group : groups)
                linear({group.hidden.data(), a.weight + v * a.weight_stride, a.out + group.first * a.vocabulary + v, a.depth,
                        a.weight_stride, a.vocabulary, group.width, group.columns, rows});
        }
    });
}

}  // namespace diffpo
