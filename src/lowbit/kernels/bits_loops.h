// Packing, the ends of a product and the products with floats, over a `Vec` of its instruction set; included
// once for each of them, after the `count_panels` that suits it.

// to[r][0 .. panels * PANEL) = bits that match; rows of `to` are CHUNK apart.
void count(const uint64_t *const *a, int rows, int64_t words, const uint64_t *w, int64_t panels, bool ternary,
           uint32_t *to) {
    (ternary ? count_panels<true> : count_panels<false>)(a, rows, words, w, panels, to);
}

// One bit for each float of a run, x >= threshold, in whole words.
void pack_run(const float *x, int64_t channels, float threshold, uint64_t *to) {
    const Vec::F at = Vec::set(threshold);
    for (int64_t c = 0; c < channels; c += 64) {
        const int n = static_cast<int>(channels - c < 64 ? channels - c : 64);
        uint64_t word = 0;
        int i = 0;
        for (; i + Vec::W <= n; i += Vec::W)
            word |= static_cast<uint64_t>(Vec::at_least(Vec::load(x + c + i), at)) << i;
        if (i < n) {
            const uint32_t bits = Vec::at_least(Vec::load(x + c + i, n - i), at) & ((1u << (n - i)) - 1u);
            word |= static_cast<uint64_t>(bits) << i;
        }
        *to++ = word;
    }
}

// One bit for each float of [channels, pixels], at most 64 channels, as one word for each pixel; words of
// neighbours are `stride` apart. A lane is a pixel and collects 32 channels.
void pack_plane(const float *x, int channels, int64_t pixels, float threshold, uint64_t *to, int64_t stride) {
    const Vec::F at = Vec::set(threshold);
    for (int64_t p = 0; p < pixels; p += Vec::W) {
        const int n = static_cast<int>(pixels - p < Vec::W ? pixels - p : Vec::W);
        uint32_t halves[2][Vec::W] = {};
        for (int c = 0; c < channels;) {
            const int half = c / 32, stop = channels < 32 * half + 32 ? channels : 32 * half + 32;
            Vec::I held = Vec::none();
            for (; c < stop; ++c) {
                const float *row = x + c * pixels + p;
                held = Vec::mark(held, n == Vec::W ? Vec::load(row) : Vec::load(row, n), at, 1u << (c % 32));
            }
            Vec::store(halves[half], held);
        }
        for (int i = 0; i < n; ++i) to[(p + i) * stride] = halves[0][i] | static_cast<uint64_t>(halves[1][i]) << 32;
    }
}

// Ors up to 64 bits into a row of words, from bit `at` on.
static inline void put_bits(uint64_t *row, int64_t at, uint64_t bits) {
    row[at / 64] |= bits << (at % 64);
    const uint64_t beyond = at % 64 ? bits >> (64 - at % 64) : 0;
    if (beyond) row[at / 64 + 1] |= beyond;
}

// bit i = (sum[i] >= threshold[i]) != flip[i]
static inline uint64_t compare(const uint32_t *sums, const int32_t *threshold, const uint8_t *flip, int n) {
    uint8_t set[CHUNK] = {};
    for (int i = 0; i < n; ++i) set[i] = (static_cast<int32_t>(sums[i]) >= threshold[i]) != flip[i];
    uint64_t word = 0;
    for (int i = 0; i < CHUNK; i += 8) word |= gather_bits(set + i) << i;
    return word;
}

// Of N outputs, or of n where N is 0.
template <int N>
static inline void finish_some(const Epilogue &e, const uint32_t *counts, int planes, int64_t pixel, int64_t from,
                               int n, const int32_t *outside, int64_t n_outside) {
    if (N) n = N;
    // differences of numbers that may pass 2^31 on the way: they are taken modulo 2^32
    uint32_t sums[CHUNK];
    for (int i = 0; i < n; ++i) sums[i] = static_cast<uint32_t>(e.base[from + i]);
    for (int p = 0; p < planes; ++p, counts += CHUNK) {
        const uint32_t factor = static_cast<uint32_t>(e.factors[p]);
        for (int i = 0; i < n; ++i) sums[i] += factor * counts[i];
    }
    for (int64_t t = 0; t < n_outside; ++t) {
        const int32_t *tap = e.taps + outside[t] * e.outputs + from;
        for (int i = 0; i < n; ++i) sums[i] += static_cast<uint32_t>(tap[i]);
    }
    if (e.kind == INT32) {
        int32_t *to = static_cast<int32_t *>(e.to) + pixel * e.outputs + from;
        for (int i = 0; i < n; ++i) to[i] = static_cast<int32_t>(sums[i]);
    } else if (e.kind == FLOAT) {
        float *to = static_cast<float *>(e.to) + pixel * e.outputs + from;
        const float *scale = e.scale + from, *bias = e.bias + from;
        for (int i = 0; i < n; ++i) to[i] = static_cast<float>(static_cast<int32_t>(sums[i])) * scale[i] + bias[i];
    } else {
        const uint64_t bits = compare(sums, e.threshold + from, e.flip + from, n);
        put_bits(static_cast<uint64_t *>(e.to) + pixel * ((e.outputs + 63) / 64), from, bits);
    }
}

// Turns the counts of `n` outputs of one pixel, from number `from` on, into what is asked for. `outside` names the
// taps of that pixel that lie in the padding.
void finish(const Epilogue &e, const uint32_t *counts, int planes, int64_t pixel, int64_t from, int n,
            const int32_t *outside, int64_t n_outside) {
    (n == CHUNK ? finish_some<CHUNK> : finish_some<0>)(e, counts, planes, pixel, from, n, outside, n_outside);
}

// to[r][0..16) = the sums of R rows, in the order that `float_product` promises; rows of `to` are CHUNK apart.
template <int R, bool TERNARY>
static void add_panel(const float *const *a, int64_t length, const uint32_t *w, float *to) {
    constexpr int V = FLOAT_PANEL / Vec::W;
    Vec::F total[R][V];
    for (auto &row : total)
        for (Vec::F &sum : row) sum = Vec::set(0.0f);
    for (int64_t k = 0; k < length; w += TERNARY ? 2 * FLOAT_PANEL : FLOAT_PANEL) {
        const int64_t stop = k + FLOAT_BLOCK < length ? k + FLOAT_BLOCK : length;
        Vec::I negative[V], positive[V];
        Vec::F part[R][V];
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
            negative[v] = Vec::load(w + v * Vec::W);
            positive[v] = TERNARY ? Vec::load(w + FLOAT_PANEL + v * Vec::W) : Vec::none();
            LOWBIT_UNROLL for (int r = 0; r < R; ++r) part[r][v] = Vec::set(0.0f);
        }
        for (; k < stop; ++k) {
            LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
                const Vec::I sign = Vec::top(negative[v]), there = Vec::spread(Vec::either(negative[v], positive[v]));
                LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
                    const Vec::F x = Vec::flip(Vec::set(a[r][k]), sign);
                    part[r][v] = Vec::add(part[r][v], TERNARY ? Vec::keep(x, there) : x);
                }
                negative[v] = Vec::up(negative[v]);
                if (TERNARY) positive[v] = Vec::up(positive[v]);
            }
        }
        LOWBIT_UNROLL for (int r = 0; r < R; ++r)
            LOWBIT_UNROLL for (int v = 0; v < V; ++v) total[r][v] = Vec::add(total[r][v], part[r][v]);
    }
    LOWBIT_UNROLL for (int r = 0; r < R; ++r)
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) Vec::store(to + r * CHUNK + v * Vec::W, total[r][v]);
}

template <bool TERNARY>
static void add_panels(const float *const *a, int rows, int64_t length, const uint32_t *w, int64_t panels, float *to) {
    const int64_t panel = (length + FLOAT_BLOCK - 1) / FLOAT_BLOCK * FLOAT_PANEL * (TERNARY ? 2 : 1);
    for (int64_t p = 0; p < panels; ++p, w += panel, to += FLOAT_PANEL) {
        int r = 0;
        for (; r + Vec::FLOAT_ROWS <= rows; r += Vec::FLOAT_ROWS)
            add_panel<Vec::FLOAT_ROWS, TERNARY>(a + r, length, w, to + r * CHUNK);
        for (; r < rows; ++r) add_panel<1, TERNARY>(a + r, length, w, to + r * CHUNK);
    }
}

// to[r][0 .. panels * FLOAT_PANEL) = sums of signed floats; rows of `to` are CHUNK apart.
void add(const float *const *a, int rows, int64_t length, const uint32_t *w, int64_t panels, bool ternary, float *to) {
    (ternary ? add_panels<true> : add_panels<false>)(a, rows, length, w, panels, to);
}
