// From a convolution to products of contiguous rows.

#pragma once

#include <algorithm>
#include <vector>

#include "bits_types.h"
#include "threads.h"

namespace {

// The rows that a range of output pixels reads, each taps() * run bytes, one after the other for each plane.
class Patches {
  public:
    // `fill` holds [planes][run] bytes for a tap in the padding.
    Patches(const Geometry &g, const void *x, const void *fill)
        : g_(g), x_(static_cast<const uint8_t *>(x)), fill_(static_cast<const uint8_t *>(fill)) {}

    // Pixels whose rows stay in the cache nearest to the processor, a whole number of tiles.
    int64_t capacity() const {
        const int64_t bytes = 16384 / (g_.taps() * g_.run * g_.planes);
        return std::clamp<int64_t>(bytes, 1, 32) * TILE;
    }

    void gather(int64_t first, int64_t count, int64_t group) {
        rows_.clear();
        outside_.clear();
        ends_.assign(1, 0);
        const bool copied = g_.taps() > 1 || g_.pad_height || g_.pad_width;
        const int64_t words = (g_.taps() * g_.run + 7) / 8;
        if (copied) scratch_.resize(static_cast<size_t>(count * g_.planes * words));
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = first + i, ox = at % g_.out_width, oy = at / g_.out_width % g_.out_height;
            const int64_t image = at / g_.out_width / g_.out_height;
            const int64_t y = oy * g_.stride_height - g_.pad_height, x = ox * g_.stride_width - g_.pad_width;
            for (int64_t plane = 0; plane < g_.planes; ++plane) {
                uint64_t *to = scratch_.data() + (i * g_.planes + plane) * words;
                if (copied) copy(image, y, x, plane, group, reinterpret_cast<uint8_t *>(to));
                rows_.push_back(copied ? static_cast<const void *>(to) : pixel(image, y, x, plane, group));
            }
            ends_.push_back(static_cast<int64_t>(outside_.size()));
        }
    }

    // Row number i * planes + p belongs to plane p of pixel i.
    template <class T>
    const T *const *rows(int64_t i) const {
        return reinterpret_cast<const T *const *>(rows_.data()) + i * g_.planes;
    }

    // The taps of a pixel that lie in the padding.
    const int32_t *outside(int64_t i) const { return outside_.data() + ends_[static_cast<size_t>(i)]; }
    int64_t n_outside(int64_t i) const { return ends_[static_cast<size_t>(i) + 1] - ends_[static_cast<size_t>(i)]; }

  private:
    const uint8_t *pixel(int64_t image, int64_t y, int64_t x, int64_t plane, int64_t group) const {
        return x_ + ((image * g_.height + y) * g_.width + x) * g_.pixel_bytes() + (plane * g_.groups + group) * g_.run;
    }

    // One row of a kernel after the other; where its taps are neighbours in x, at once.
    void copy(int64_t image, int64_t y, int64_t x, int64_t plane, int64_t group, uint8_t *to) {
        const int64_t width = g_.kernel_width, reach = x + (width - 1) * g_.dilation_width;
        const bool inside = x >= 0 && reach < g_.width;
        const bool neighbours = g_.dilation_width == 1 && g_.pixel_bytes() == g_.run;
        for (int64_t ky = 0; ky < g_.kernel_height; ++ky, y += g_.dilation_height, to += width * g_.run) {
            const bool there = y >= 0 && y < g_.height;
            if (there && inside && neighbours) {
                std::memcpy(to, pixel(image, y, x, plane, group), static_cast<size_t>(width * g_.run));
                continue;
            }
            for (int64_t kx = 0, at = x; kx < width; ++kx, at += g_.dilation_width) {
                const bool padding = !there || at < 0 || at >= g_.width;
                const uint8_t *from = padding ? fill_ + plane * g_.run : pixel(image, y, at, plane, group);
                std::memcpy(to + kx * g_.run, from, static_cast<size_t>(g_.run));
                if (padding && plane == 0) outside_.push_back(static_cast<int32_t>(ky * width + kx));
            }
        }
    }

    const Geometry &g_;
    const uint8_t *x_, *fill_;
    std::vector<uint64_t> scratch_;
    std::vector<const void *> rows_;
    std::vector<int32_t> outside_;
    std::vector<int64_t> ends_;
};

// Calls product(patches, first pixel, pixels, group, chunk) for everything there is, a block of rows for one chunk
// of weights after the other. Threads take pixels, or chunks where pixels are few and no chunks share a word.
template <class Product>
void convolve(const Geometry &g, const void *x, const void *fill, int64_t work, int threads, const Product &product) {
    auto run = [&](int64_t begin, int64_t end, int64_t chunk_begin, int64_t chunk_end) {
        Patches patches(g, x, fill);
        for (int64_t group = 0; group < g.groups; ++group) {
            for (int64_t at = begin; at < end; at += patches.capacity()) {
                const int64_t n = std::min(patches.capacity(), end - at);
                patches.gather(at, n, group);
                for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) product(patches, at, n, group, chunk);
            }
        }
    };
    if (g.groups == 1 && g.pixels() < TILE * threads)
        return split(g.chunks(), 1, work, threads,
                     [&](int64_t, int64_t begin, int64_t end) { run(0, g.pixels(), begin, end); });
    split(g.pixels(), TILE, work, threads,
          [&](int64_t, int64_t begin, int64_t end) { run(begin, end, 0, g.chunks()); });
}

}  // namespace
