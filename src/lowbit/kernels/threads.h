// One loop split over threads that stay.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace {

// An element takes some 0.2 ns, waking a thread some 10 us: with fewer than so many elements one is enough.
constexpr int64_t WORTH_A_THREAD = 200000;

// How long a thread without work looks for more before it sleeps: the next layer comes sooner.
constexpr std::chrono::microseconds PATIENCE(200);

#if defined(__unix__) || defined(__APPLE__)
inline int64_t process() { return getpid(); }
#else
inline int64_t process() { return 0; }
#endif

// What all parts of a loop do.
struct Job {
    void (*call)(const void *work, int64_t part);
    const void *work;
};

// A thread that does its part of one job after the other, and lives as long as the process.
class Helper {
  public:
    // Raises std::system_error where no thread can be had.
    explicit Helper(int64_t part) {
        std::thread([this, part] {
            for (;;) {
                const Job *job = next();
                job->call(job->work, part);
                job_.store(nullptr, std::memory_order_release);
            }
        }).detach();
    }

    void begin(const Job &job) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_.store(&job, std::memory_order_release);
        }
        wake_.notify_one();
    }

    void finish() const {
        for (int tries = 0; job_.load(std::memory_order_acquire); ++tries)
            if (tries >= 1000) std::this_thread::yield();
    }

  private:
    const Job *next() {
        const auto end = std::chrono::steady_clock::now() + PATIENCE;
        do {
            for (int tries = 0; tries < 100; ++tries)
                if (const Job *job = job_.load(std::memory_order_acquire)) return job;
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return job_.load(std::memory_order_acquire) != nullptr; });
        return job_.load(std::memory_order_acquire);
    }

    std::atomic<const Job *> job_{nullptr};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// The helpers of a process; one loop has them at a time.
class Team {
  public:
    // Never destroyed, for its threads end with the process; another one after a fork, which takes no threads along.
    static Team &of_this_process() {
        static std::atomic<Team *> current{nullptr};
        Team *team = current.load(std::memory_order_acquire);
        if (team && team->process_ == process()) return *team;
        auto fresh = std::make_unique<Team>();
        if (!current.compare_exchange_strong(team, fresh.get(), std::memory_order_acq_rel)) return *team;
        return *fresh.release();
    }

    // Calls job for all parts in [0, parts), and returns when they are done.
    void run(const Job &job, int64_t parts) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        const int64_t helped = lock.owns_lock() ? hire(parts - 1) : 0;
        for (int64_t i = 0; i < helped; ++i) helpers_[static_cast<size_t>(i)]->begin(job);
        job.call(job.work, 0);
        for (int64_t part = helped + 1; part < parts; ++part) job.call(job.work, part);
        for (int64_t i = 0; i < helped; ++i) helpers_[static_cast<size_t>(i)]->finish();
    }

  private:
    // How many of `wanted` helpers there are.
    int64_t hire(int64_t wanted) {
        try {
            while (static_cast<int64_t>(helpers_.size()) < wanted)
                helpers_.push_back(std::make_unique<Helper>(static_cast<int64_t>(helpers_.size()) + 1));
        } catch (const std::system_error &) {
            return static_cast<int64_t>(helpers_.size());
        }
        return wanted;
    }

    const int64_t process_ = process();
    std::mutex mutex_;
    std::vector<std::unique_ptr<Helper>> helpers_;
};

// Calls work(part, begin, end) for at most `threads` parts of [0, n), each but the last a multiple of `unit`.
// Which part an item belongs to depends on n, unit and threads alone.
template <class Work>
void split(int64_t n, int64_t unit, int64_t elements, int threads, const Work &work) {
    const int64_t units = (n + unit - 1) / unit;
    int64_t parts = elements < WORTH_A_THREAD ? 1 : threads;
    parts = parts < units ? parts : units;
    if (parts <= 1) return work(0, 0, n);
    const int64_t step = (units + parts - 1) / parts * unit;
    const auto piece = [&](int64_t part) {
        const int64_t begin = part * step;
        work(part, begin, begin + step < n ? begin + step : n);
    };
    const auto call = [](const void *piece_of, int64_t part) { (*static_cast<decltype(&piece)>(piece_of))(part); };
    Team::of_this_process().run({call, &piece}, (n + step - 1) / step);
}

}  // namespace
