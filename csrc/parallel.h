// Runs body(begin, end) over [0, count) on up to `threads` threads.
//
// Plain threads, started per call: about 15 us each, which is why callers say how much work deserves one. A pool would have to survive
// fork, and OpenMP would bring a second runtime whose idle threads spin against those of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace diffpo {

template <typename Body>
void parallel_for(int64_t count, int64_t threads, const Body& body) {
    threads = std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1));
    const auto bound = [&](int64_t k) { return count * k / threads; };
    std::vector<std::exception_ptr> errors(threads);
    std::vector<std::thread> workers;
    const auto run = [&](int64_t k) {
        try {
            body(bound(k), bound(k + 1));
        } catch (...) {
            errors[k] = std::current_exception();
        }
    };
    for (int64_t k = 1; k < threads; ++k) {
        try {
            workers.emplace_back(run, k);
        } catch (...) {  // no more threads to be had: do this share here
            run(k);
        }
    }
    run(0);
    for (std::thread& worker : workers) worker.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

}  // namespace diffpo
