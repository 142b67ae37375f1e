// The loops of tensor_train.cpp, over a `Vec` of its instruction set; included once for each of them.

// Twelve vectors of sums: enough to hide the latency of a multiplication and an addition, few enough for registers.
template <int V>
constexpr int MOST_ROWS = 12 / V;

// C = A B + D for R rows and n columns, V vectors of them; TAIL where n does not fill these.
template <int R, int V, bool TAIL>
static void tile(const Product &p, const float *a, const float *b, const float *d, float *c, int64_t n) {
    using F = Vec::F;
    int lanes[V];
    LOWBIT_UNROLL
    for (int v = 0; v < V; ++v) lanes[v] = static_cast<int>(n - v * Vec::W < Vec::W ? n - v * Vec::W : Vec::W);
    F sum[R][V];
    LOWBIT_UNROLL
    for (int i = 0; i < R; ++i) {
        LOWBIT_UNROLL
        for (int v = 0; v < V; ++v) {
            const float *from = d + i * p.columns + v * Vec::W;
            sum[i][v] = !d ? Vec::set(0.0f) : TAIL ? Vec::load(from, lanes[v]) : Vec::load(from);
        }
    }
    for (int64_t k = 0; k < p.depth; ++k, b += p.stride) {
        F right[V];
        LOWBIT_UNROLL
        for (int v = 0; v < V; ++v) {
            right[v] = TAIL ? Vec::load(b + v * Vec::W, lanes[v]) : Vec::load(b + v * Vec::W);
        }
        LOWBIT_UNROLL
        for (int i = 0; i < R; ++i) {
            const F left = Vec::set(a[i * p.depth + k]);
            LOWBIT_UNROLL
            for (int v = 0; v < V; ++v) sum[i][v] = Vec::add_product(sum[i][v], left, right[v]);
        }
    }
    LOWBIT_UNROLL
    for (int i = 0; i < R; ++i) {
        LOWBIT_UNROLL
        for (int v = 0; v < V; ++v) {
            float *to = c + i * p.columns + v * Vec::W;
            TAIL ? Vec::store(to, sum[i][v], lanes[v]) : Vec::store(to, sum[i][v]);
        }
    }
}

using Tile = void (*)(const Product &, const float *, const float *, const float *, float *, int64_t);

template <int V, bool TAIL, int... ROWS>
static Tile tile_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static constexpr Tile TILES[] = {tile<ROWS + 1, V, TAIL>...};
    return TILES[rows - 1];
}

// One panel of n columns, its rows in tiles of as nearly the same height as may be.
template <int V, bool TAIL>
static void panel(const Product &p, const float *b, int64_t at, int64_t n) {
    const int64_t tiles = (p.rows + MOST_ROWS<V> - 1) / MOST_ROWS<V>;
    for (int64_t t = 0, row = 0; t < tiles; ++t) {
        const int64_t height = (p.rows - row + tiles - t - 1) / (tiles - t);
        const Tile run = tile_of<V, TAIL>(height, std::make_integer_sequence<int, MOST_ROWS<V>>());
        const int64_t to = row * p.columns + at;
        run(p, p.a + row * p.depth, b, p.d ? p.d + to : nullptr, p.c + to, n);
        row += height;
    }
}

using Panel = void (*)(const Product &, const float *, int64_t, int64_t);

template <bool TAIL, int... VECTORS>
static Panel panel_of(int64_t vectors, std::integer_sequence<int, VECTORS...>) {
    static constexpr Panel PANELS[] = {panel<VECTORS + 1, TAIL>...};
    return PANELS[vectors - 1];
}

void product(const Product &p) {
    constexpr std::make_integer_sequence<int, PANEL / Vec::W> WIDTHS{};
    for (int64_t at = 0; at < p.columns; at += PANEL) {
        const int64_t n = p.columns - at < PANEL ? p.columns - at : PANEL, vectors = (n + Vec::W - 1) / Vec::W;
        const Panel run = n % Vec::W ? panel_of<true>(vectors, WIDTHS) : panel_of<false>(vectors, WIDTHS);
        run(p, p.b + at / PANEL * p.panel, at, n);
    }
}
