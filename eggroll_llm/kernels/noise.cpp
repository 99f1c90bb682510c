// The factors of many pairs and parameters of one shape, to the bits of `eggroll_llm/es/noise.py`, which defines them.
//
// One item is one (parameter, pair): its stream of normals is made sixteen blocks at a time, Philox4x32-10 and
// Box-Muller, then rounded into the pair's row, as A [rank, out] and B [rank, in]. To be compiled without contraction of
// a * b + c: every float32 operation rounds on its own.

#include <cmath>
#include <vector>

#include "vector.h"

namespace {

typedef uint64_t Products __attribute__((vector_size(LANES * 8)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

struct Key {
    uint32_t low, high;
};

// Philox4x32-10 of the counter (step, pair, parameter id, block) in each lane
inline void philox(Words (&c)[4], Key key) {
    for (int round = 0; round < 10; ++round) {
        const Products p0 = __builtin_convertvector(c[0], Products) * 0xD2511F53u;
        const Products p2 = __builtin_convertvector(c[2], Products) * 0xCD9E8D57u;
        c[0] = __builtin_convertvector(p2 >> 32, Words) ^ c[1] ^ key.low;
        c[2] = __builtin_convertvector(p0 >> 32, Words) ^ c[3] ^ key.high;
        c[1] = __builtin_convertvector(p2, Words);
        c[3] = __builtin_convertvector(p0, Words);
        key.low += 0x9E3779B9u;
        key.high += 0xBB67AE85u;
    }
}

template <size_t N>
inline Floats polynomial(Floats x, const float (&coefficient)[N]) {  // lowest power first
    Floats value = x * coefficient[N - 1];
    for (size_t i = N - 2; i > 0; --i) value = (value + coefficient[i]) * x;
    return value + coefficient[0];
}

struct Tables {
    float minus_two_log[8], sine[5], cosine[5], minus_two_ln2;
};

inline void box_muller(Words radius_word, Words angle_word, const Tables& tables, Floats& cosine, Floats& sine) {
    const Words SQRT_HALF = Words{} + 0x3F3504F3u, MANTISSA = Words{} + 0x7FFFFFu;
    const Integers magnitude = (Integers)(radius_word & 0x7FFFFFFFu);
    const Floats uniform = __builtin_convertvector(magnitude, Floats) + 1.0f;
    const Integers bits = (Integers)(as_words(uniform) - SQRT_HALF - (31u << 23));
    const Floats exponent = __builtin_convertvector(bits >> 23, Floats);
    const Floats z = as_floats(((Words)bits & MANTISSA) + SQRT_HALF) - 1.0f;
    const Floats square = polynomial(z, tables.minus_two_log) * z + exponent * tables.minus_two_ln2;
    Floats radius;
    for (int64_t j = 0; j < LANES; ++j) radius[j] = std::sqrt(square[j]);
    radius = as_floats(as_words(radius) | (radius_word & 0x80000000u));
    const Floats x = __builtin_convertvector((Integers)angle_word, Floats) * 0x1p-31f;
    const Floats y = x * x;
    cosine = polynomial(y, tables.cosine) * radius;
    sine = polynomial(y, tables.sine) * x * radius;
}

// to[r, i] = round(scale * from[i, r])
template <typename T>
void write(T* to, const float* from, int64_t size, int64_t rank, float scale) {
    std::vector<float> column(rank == 1 ? 0 : size);
    for (int64_t r = 0; r < rank; ++r) {
        for (int64_t i = 0; i < static_cast<int64_t>(column.size()); ++i) column[i] = from[i * rank + r];
        const float* values = rank == 1 ? from : column.data();
        for (int64_t i = 0; i < size; i += LANES)
            store(to + r * size + i, load(values + i, size - i) * scale, size - i);
    }
}

struct Noise {
    uint32_t step;
    Key key;
    const Tables& tables;
};

// Values [first, end) of a stream, with those around them in the same vectors of blocks
struct Range {
    int64_t block, blocks, skipped;
    Range(int64_t first, int64_t end)
        : block(first / 4), blocks(((end + 3) / 4 - block + LANES - 1) / LANES * LANES), skipped(first % 4) {}
};

void normals(float* to, Range range, uint32_t pair, uint32_t id, const Noise& noise) {
    Words lane;
    for (int64_t j = 0; j < LANES; ++j) lane[j] = j;
    for (int64_t block = 0; block < range.blocks; block += LANES) {
        Words w[4] = {Words{} + noise.step, Words{} + pair, Words{} + id,
                      lane + static_cast<uint32_t>(range.block + block)};
        philox(w, noise.key);
        Floats value[4];
        box_muller(w[0], w[1], noise.tables, value[0], value[1]);
        box_muller(w[2], w[3], noise.tables, value[2], value[3]);
        for (int64_t j = 0; j < LANES; ++j)
            for (int64_t i = 0; i < 4; ++i) to[4 * (block + j) + i] = value[i][j];
    }
}

// A are `out` rows of the stream from row first_A on, B `in` rows from first_B: next to each other unless they are parts
template <typename T>
void factors(T* rows, int64_t width, const int64_t* at_A, const int64_t* at_B, const int64_t* pairs,
             const uint32_t* ids, int64_t number_of_pairs, int64_t parameters, int64_t out, int64_t in,
             int64_t first_A, int64_t first_B, int64_t rank, float scale, const Noise& noise) {
    const bool adjacent = first_B == first_A + out;
    const Range range_A(first_A * rank, adjacent ? (first_B + in) * rank : (first_A + out) * rank);
    const Range range_B(first_B * rank, (first_B + in) * rank);
    const int64_t begin_A = range_A.skipped;
    const int64_t begin_B = adjacent ? begin_A + out * rank : 4 * range_A.blocks + range_B.skipped;
#pragma omp parallel
    {
        std::vector<float> stream(4 * (range_A.blocks + (adjacent ? 0 : range_B.blocks)));
#pragma omp for schedule(static)
        for (int64_t item = 0; item < parameters * number_of_pairs; ++item) {
            const int64_t k = item % number_of_pairs, n = item / number_of_pairs;
            const uint32_t pair = static_cast<uint32_t>(pairs[k]);
            normals(stream.data(), range_A, pair, ids[n], noise);
            if (!adjacent) normals(stream.data() + 4 * range_A.blocks, range_B, pair, ids[n], noise);
            write(rows + k * width + at_A[n], stream.data() + begin_A, out, rank, scale);
            write(rows + k * width + at_B[n], stream.data() + begin_B, in, rank, 1.0f);
        }
    }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                             \
    extern "C" void eggroll_factors_##suffix(                                                                         \
        T* rows, int64_t width, const int64_t* at_A, const int64_t* at_B, const int64_t* pairs, const uint32_t* ids,  \
        int64_t number_of_pairs, int64_t parameters, int64_t out, int64_t in, int64_t first_A, int64_t first_B,       \
        int64_t rank, float scale, uint32_t step, uint64_t seed, const float* tables) {                               \
        Tables t;                                                                                                     \
        static_assert(sizeof t == 19 * sizeof(float), "eight, five, five and one, as Python hands them over");        \
        std::memcpy(&t, tables, sizeof t);                                                                            \
        const Noise noise{step, {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, t};                 \
        factors(rows, width, at_A, at_B, pairs, ids, number_of_pairs, parameters, out, in, first_A, first_B, rank,    \
                scale, noise);                                                                                        \
    }

EXPORT(float32, float)
EXPORT(bfloat16, uint16_t)
