// How many bits of an activation and a weight match, over a `Vec` of 64-bit lanes; included once for each
// instruction set that counts the bits of a vector.
//
// A panel holds 8 outputs as [word][plane][8 outputs]: a lane is an output, so that no sum crosses lanes.

constexpr int UNIT = 8;  // bytes of one output, neighbours in memory
constexpr int PANEL = 8;

// to[r][0..8) for the R rows of `a`, each `words` long; rows of `to` are CHUNK apart.
template <int R, bool TERNARY>
static void count_panel(const uint64_t *const *a, int64_t words, const uint64_t *w, uint32_t *to) {
    constexpr int V = PANEL / Vec::LANES, STEP = TERNARY ? 2 * PANEL : PANEL;
    Vec::Sum sums[R][V];
    LOWBIT_UNROLL for (int r = 0; r < R; ++r)
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = Vec::no_sum();
    for (int64_t k = 0; k < words;) {
        const int64_t stop = k + Vec::BLOCK < words ? k + Vec::BLOCK : words;
        Vec::Count counts[R][V];
        LOWBIT_UNROLL for (int r = 0; r < R; ++r)
            LOWBIT_UNROLL for (int v = 0; v < V; ++v) counts[r][v] = Vec::no_count();
        for (; k < stop; ++k, w += STEP) {
            LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
                const Vec::U negative = Vec::load(w + v * Vec::LANES);
                const Vec::U positive = TERNARY ? Vec::load(w + PANEL + v * Vec::LANES) : negative;
                LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
                    const Vec::U x = Vec::set(a[r][k]);
                    const Vec::U match = TERNARY ? Vec::choose(x, positive, negative) : Vec::differ(x, negative);
                    counts[r][v] = Vec::count(counts[r][v], match);
                }
            }
        }
        LOWBIT_UNROLL for (int r = 0; r < R; ++r)
            LOWBIT_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = Vec::widen(sums[r][v], counts[r][v]);
    }
    LOWBIT_UNROLL for (int r = 0; r < R; ++r)
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) Vec::store_sum(to + r * CHUNK + v * Vec::LANES, sums[r][v]);
}

template <bool TERNARY>
static void count_panels(const uint64_t *const *a, int rows, int64_t words, const uint64_t *w, int64_t panels,
                         uint32_t *to) {
    for (int64_t p = 0; p < panels; ++p, w += words * (TERNARY ? 2 * PANEL : PANEL), to += PANEL) {
        int r = 0;
        for (; r + Vec::ROWS <= rows; r += Vec::ROWS)
            count_panel<Vec::ROWS, TERNARY>(a + r, words, w, to + r * CHUNK);
        for (; r < rows; ++r) count_panel<1, TERNARY>(a + r, words, w, to + r * CHUNK);
    }
}
