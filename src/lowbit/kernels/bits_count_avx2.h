// How many bits of an activation and a weight match, where no instruction counts the bits of a vector.
//
// A panel holds 32 outputs as [byte][plane][32 outputs]. All outputs meet the same byte of an activation, so one
// shuffle looks up, for four bits of 32 weights at once, how many match four bits of the activation: the table of
// 16 answers is chosen by the activation and replaces both the comparison and the count.
// (Lookup by shuffle: Mula, Kurz, Lemire, "Faster Population Counts Using AVX2 Instructions", 2018; a table for
// each activation: Wei et al., "T-MAC", 2024.)

constexpr int UNIT = 1;  // bytes of one output, neighbours in memory
constexpr int PANEL = 32;

constexpr uint8_t bits_of(int x) { return static_cast<uint8_t>((x & 1) + (x >> 1 & 1) + (x >> 2 & 1) + (x >> 3 & 1)); }

// For a byte of activations, the answers to its low four bits and then to its high four.
struct Tables {
    alignas(64) uint8_t differ[256][32];
    alignas(64) uint8_t both[256][32];
};

constexpr Tables make_tables() {
    Tables tables{};
    for (int a = 0; a < 256; ++a) {
        for (int w = 0; w < 32; ++w) {
            const int half = w < 16 ? a & 15 : a >> 4;
            tables.differ[a][w] = bits_of(half ^ (w & 15));
            tables.both[a][w] = bits_of(half & w & 15);
        }
    }
    return tables;
}

constexpr Tables TABLES = make_tables();

// Bytes of an activation whose counts fit 8 bits, and then 16.
constexpr int64_t BYTE_BLOCK = 31, SHORT_BLOCK = 65535 / 8;

constexpr int AHEAD = 2048;

// Adds the matches of one byte of R rows with one plane of V panels.
template <int R, int V, bool INVERT>
static inline void count_byte(const uint8_t *const *a, int64_t at, const uint8_t (*table)[32], const uint8_t *w,
                              int64_t panel, __m256i (&counts)[R][V]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i low[V], high[V];
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
        // one row reads more weights than it computes with: it waits for memory unless that is told ahead
        if (R == 1) _mm_prefetch(reinterpret_cast<const char *>(w + v * panel) + AHEAD, _MM_HINT_T0);
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w + v * panel));
        low[v] = _mm256_and_si256(both, nibble);
        high[v] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
    }
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
        const uint8_t x = INVERT ? static_cast<uint8_t>(~a[r][at]) : a[r][at];
        const __m128i *answers = reinterpret_cast<const __m128i *>(table[x]);
        const __m256i to_low = _mm256_broadcastsi128_si256(_mm_load_si128(answers));
        const __m256i to_high = _mm256_broadcastsi128_si256(_mm_load_si128(answers + 1));
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
            counts[r][v] = _mm256_add_epi8(counts[r][v], _mm256_shuffle_epi8(to_low, low[v]));
            counts[r][v] = _mm256_add_epi8(counts[r][v], _mm256_shuffle_epi8(to_high, high[v]));
        }
    }
}

// Adds the even and the odd of 32 bytes to two vectors of 16 bits.
static inline void widen(__m256i counts, __m256i (&sums)[2]) {
    sums[0] = _mm256_add_epi16(sums[0], _mm256_and_si256(counts, _mm256_set1_epi16(255)));
    sums[1] = _mm256_add_epi16(sums[1], _mm256_srli_epi16(counts, 8));
}

// Adds the even and the odd of 32 sums to them.
static inline void add_to(uint32_t *to, const __m256i (&sums)[2]) {
    const __m256i first = _mm256_unpacklo_epi16(sums[0], sums[1]);   // outputs 0..7 and 16..23
    const __m256i second = _mm256_unpackhi_epi16(sums[0], sums[1]);  // outputs 8..15 and 24..31
    const __m128i eights[4] = {_mm256_castsi256_si128(first), _mm256_castsi256_si128(second),
                               _mm256_extracti128_si256(first, 1), _mm256_extracti128_si256(second, 1)};
    for (int i = 0; i < 4; ++i) {
        __m256i *at = reinterpret_cast<__m256i *>(to + 8 * i);
        _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), _mm256_cvtepu16_epi32(eights[i])));
    }
}

// Counts bytes [k, stop) of R rows, few enough to fit a byte. On its own, so that all counts stay in registers.
template <int R, int V, bool TERNARY>
LOWBIT_APART static void count_bytes(const uint8_t *const *rows, int64_t k, int64_t stop, const uint8_t *w,
                                     int64_t panel, __m256i (&to)[R][V]) {
    const uint8_t *a[R];
    __m256i counts[R][V];
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
        a[r] = rows[r];
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) counts[r][v] = _mm256_setzero_si256();
    }
    constexpr int STEP = TERNARY ? 2 * PANEL : PANEL;
    for (int64_t i = k; i < stop; ++i, w += STEP)
        count_byte<R, V, TERNARY>(a, i, TERNARY ? TABLES.both : TABLES.differ, w, panel, counts);
    if (TERNARY) {
        w += PANEL - (stop - k) * STEP;
        for (int64_t i = k; i < stop; ++i, w += STEP) count_byte<R, V, false>(a, i, TABLES.both, w, panel, counts);
    }
    LOWBIT_UNROLL for (int r = 0; r < R; ++r)
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) to[r][v] = counts[r][v];
}

// Adds to to[r][0..32 V) for the R rows of `a`, bytes [begin, end) of each; rows of `to` are CHUNK apart.
template <int R, int V, bool TERNARY>
static void count_block(const uint8_t *const *a, int64_t begin, int64_t end, const uint8_t *w, int64_t panel,
                        uint32_t *to) {
    __m256i sums[R][V][2];
    for (auto &row : sums)
        for (auto &sum : row) sum[0] = sum[1] = _mm256_setzero_si256();
    for (int64_t k = begin; k < end; k += BYTE_BLOCK) {
        __m256i counts[R][V];
        const int64_t stop = k + BYTE_BLOCK < end ? k + BYTE_BLOCK : end;
        count_bytes<R, V, TERNARY>(a, k, stop, w + k * (TERNARY ? 2 * PANEL : PANEL), panel, counts);
        LOWBIT_UNROLL for (int r = 0; r < R; ++r)
            LOWBIT_UNROLL for (int v = 0; v < V; ++v) widen(counts[r][v], sums[r][v]);
    }
    LOWBIT_UNROLL for (int r = 0; r < R; ++r)
        LOWBIT_UNROLL for (int v = 0; v < V; ++v) add_to(to + r * CHUNK + v * PANEL, sums[r][v]);
}

template <int R, int V, bool TERNARY>
static void count_rows(const uint64_t *const *a, int64_t words, const uint8_t *w, uint32_t *to) {
    const uint8_t *bytes[R];
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
        bytes[r] = reinterpret_cast<const uint8_t *>(a[r]);
        std::memset(to + r * CHUNK, 0, V * PANEL * sizeof(uint32_t));
    }
    const int64_t length = 8 * words, panel = length * (TERNARY ? 2 * PANEL : PANEL);
    for (int64_t k = 0; k < length; k += SHORT_BLOCK) {
        const int64_t stop = k + SHORT_BLOCK < length ? k + SHORT_BLOCK : length;
        count_block<R, V, TERNARY>(bytes, k, stop, w, panel, to);
    }
}

template <int V, bool TERNARY>
static void count_chunk(const uint64_t *const *a, int rows, int64_t words, const uint8_t *w, uint32_t *to) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) count_rows<4, V, TERNARY>(a + r, words, w, to + r * CHUNK);
    if (rows - r >= 2) {
        count_rows<2, V, TERNARY>(a + r, words, w, to + r * CHUNK);
        r += 2;
    }
    if (r < rows) count_rows<1, V, TERNARY>(a + r, words, w, to + r * CHUNK);
}

template <bool TERNARY>
static void count_panels(const uint64_t *const *a, int rows, int64_t words, const uint64_t *w, int64_t panels,
                         uint32_t *to) {
    const uint8_t *bytes = reinterpret_cast<const uint8_t *>(w);
    if (panels == 2) return count_chunk<2, TERNARY>(a, rows, words, bytes, to);
    count_chunk<1, TERNARY>(a, rows, words, bytes, to);
}
