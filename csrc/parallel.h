// Runs body(begin, end) over [0, count) on up to `threads` threads: those that torch computes with.
//
// torch's idle OpenMP threads spin for milliseconds after each of its operators. Threads of our own would share their cores with them: row
// statistics right behind an eager operator took 2 to 4 times as long. So the work is given to the OpenMP runtime that torch has
// loaded, found by name at run time. Where there is none, and in a forked child (whose OpenMP threads stayed in the parent),
// threads are started per call, about 15 us each, which is why callers say how much work deserves one.
#pragma once

#include <algorithm>
#include <cstdint>

namespace diffpo {

// Calls share(context, k) once for each k in [0, shares), at the same time where it can. Rethrows the first exception.
void run_shares(int64_t shares, void (*share)(void* context, int64_t k), void* context);

template <typename Body>
void parallel_for(int64_t count, int64_t threads, const Body& body) {
    threads = std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1));
    if (threads == 1) return body(int64_t{0}, count);
    auto share = [&](int64_t k) { body(count * k / threads, count * (k + 1) / threads); };
    run_shares(threads, [](void* context, int64_t k) { (*static_cast<decltype(share)*>(context))(k); }, &share);
}

}  // namespace diffpo
