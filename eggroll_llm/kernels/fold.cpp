// master[o, i] += sum_k A[k, o] * B[k, i],    served[o, i] = round(master[o, i])
//
// A chunk of a step's estimate added to a weight, in one pass over its memory. The sum over k starts from 0 and goes in
// order, so the bits depend on neither tiles nor threads; it is added to the master once.

#include "vector.h"

namespace {

constexpr int64_t ROWS = 4, VECTORS = 4;
constexpr int64_t AHEAD = 2 * VECTORS * LANES;  // values that the master is fetched before it is needed

// N rows and V vectors of the result, of which the first `columns` columns are there
template <int N, int V, typename T>
inline void fold_tile(float* master, T* served, const float* A, const float* B, int64_t terms, int64_t out, int64_t in,
                      int64_t columns) {
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) __builtin_prefetch(master + n * in + v * LANES + AHEAD, 1);
    Floats sum[N][V] = {};
    for (int64_t k = 0; k < terms; ++k) {
        Floats b[V];
        for (int v = 0; v < V; ++v) b[v] = load(B + k * in + v * LANES, columns - v * LANES);
        for (int n = 0; n < N; ++n)
            for (int v = 0; v < V; ++v) sum[n][v] += A[k * out + n] * b[v];
    }
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) {
            const int64_t at = n * in + v * LANES, size = columns - v * LANES;
            const Floats updated = load(master + at, size) + sum[n][v];
            store(master + at, updated, size);
            if (served) store(served + at, updated, size);
        }
}

template <typename T>
void fold(float* master, T* served, const float* A, const float* B, int64_t terms, int64_t out, int64_t in) {
    constexpr int64_t COLUMNS = VECTORS * LANES;
    const auto served_at = [&](int64_t at) { return served ? served + at : served; };
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < out; first += ROWS) {
        const int64_t tiled = first + ROWS <= out ? in - in % COLUMNS : 0;
        for (int64_t i = 0; i < tiled; i += COLUMNS) {
            const int64_t at = first * in + i;
            fold_tile<ROWS, VECTORS>(master + at, served_at(at), A + first, B + i, terms, out, in, COLUMNS);
        }
        for (int64_t o = first; o < first + ROWS && o < out; ++o)
            for (int64_t i = tiled; i < in; i += LANES) {
                const int64_t at = o * in + i;
                fold_tile<1, 1>(master + at, served_at(at), A + o, B + i, terms, out, in, in - i);
            }
    }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                           \
    extern "C" void eggroll_fold_##suffix(float* master, T* served, const float* A, const float* B, int64_t terms,  \
                                          int64_t out, int64_t in) {                                                \
        fold(master, served, A, B, terms, out, in);                                                                 \
    }

EXPORT(float32, float)
EXPORT(bfloat16, uint16_t)
