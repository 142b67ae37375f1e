// One loop split over threads.

#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace {

// A thread costs some 30 us to start: with fewer elements than this one is enough.
constexpr int64_t WORTH_A_THREAD = 1000000;

// Calls work(part, begin, end) for at most `threads` parts of [0, n), each but the last a multiple of `unit`.
// Which part an item belongs to depends on n, unit and threads alone.
template <class Work>
void split(int64_t n, int64_t unit, int64_t elements, int threads, const Work &work) {
    const int64_t units = (n + unit - 1) / unit;
    int64_t parts = elements < WORTH_A_THREAD ? 1 : threads;
    parts = parts < units ? parts : units;
    if (parts <= 1) return work(0, 0, n);
    const int64_t step = (units + parts - 1) / parts * unit;
    std::vector<std::thread> others;
    for (int64_t part = 1; part * step < n; ++part) {
        const int64_t begin = part * step, end = begin + step < n ? begin + step : n;
        try {
            others.emplace_back(work, part, begin, end);
        } catch (const std::system_error &) {
            work(part, begin, end);
        }
    }
    work(0, 0, step);
    for (std::thread &other : others) other.join();
}

}  // namespace
