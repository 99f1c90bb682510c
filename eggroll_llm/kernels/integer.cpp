// The int8 language model of integer/model.py, which defines every number here, and the sum of integer/update.py.
//
// A few members advance together, so that a weight is read once for all of them. Where the processor multiplies bytes
// (AVX512-VNNI: unsigned by signed) weights are kept as w + 128 and the surplus, 128 times the sum of x, is taken off.
// With AVX2 alone bytes are widened to 16 bits, whose products it adds in pairs.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#define PACKED
#endif

namespace {

constexpr int D = 64, H = 4 * D, V = 256;  // width, width inside the MLP, bytes
constexpr int TOGETHER = 4;                // members

enum { EMBED, NORM, FORGET_X, FORGET_H, FORGET_B, NEW_X, NEW_H, NEW_B, MLP_NORM, UP, DOWN, LAST_NORM, HEAD, PARAMETERS };

struct Tables {
    const int32_t *exp2, *log2, *inverse;
};

// Low-rank noise of a member for one matrix; the sign is that of the twin.
struct Noise {
    const int8_t *A, *B;
    int sign;
};

#ifdef __AVX512VNNI__
typedef uint8_t Packed;
constexpr int GROUP = 4, SURPLUS = 128;  // inputs whose products one instruction adds
#elif defined(PACKED)
typedef int16_t Packed;
constexpr int GROUP = 2, SURPLUS = 0;
#endif

struct Weights {
    const int8_t* of[PARAMETERS];
#ifdef PACKED
    alignas(64) Packed packed[(4 * D + 2 * H + V) * D];
    const Packed* packed_of[PARAMETERS];
#endif
};

inline int8_t clipped(int32_t v) { return static_cast<int8_t>(std::min(127, std::max(-127, v))); }

// [O][I] to [I / GROUP][O][GROUP]
void pack([[maybe_unused]] Weights& w) {
#ifdef PACKED
    const int matrices[] = {FORGET_X, FORGET_H, NEW_X, NEW_H, UP, DOWN, HEAD};
    Packed* to = w.packed;
    for (int k : matrices) {
        const int in = k == DOWN ? H : D, out = k == UP || k == HEAD ? H : D;
        for (int o = 0; o < out; ++o)
            for (int i = 0; i < in; ++i)
                to[(i / GROUP * out + o) * GROUP + i % GROUP] = static_cast<Packed>(w.of[k][o * in + i] + SURPLUS);
        w.packed_of[k] = to;
        to += out * in;
    }
#endif
}

#ifdef __AVX512VNNI__

inline int32_t dot(const int8_t* a, const int8_t* b, int n) {
    const __m512i ones = _mm512_set1_epi8(1), top = _mm512_set1_epi8(-128);
    __m512i sum = _mm512_setzero_si512(), surplus = sum;
    for (int i = 0; i < n; i += 64) {
        const __m512i y = _mm512_loadu_si512(b + i);
        sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(_mm512_loadu_si512(a + i), top), y);
        surplus = _mm512_dpbusd_epi32(surplus, ones, y);
    }
    return _mm512_reduce_add_epi32(_mm512_sub_epi32(sum, _mm512_slli_epi32(surplus, 7)));
}

// y = 256 x W^T
template <int O, int I>
inline void product(const Weights& w, int k, const int8_t (&x)[TOGETHER][I], int32_t (&y)[TOGETHER][O]) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i start[TOGETHER];
    for (int m = 0; m < TOGETHER; ++m) {
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < I; i += 64) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(x[m] + i));
        start[m] = _mm512_set1_epi32(-128 * _mm512_reduce_add_epi32(sum));
    }
    for (int o = 0; o < O; o += 64) {
        __m512i sum[TOGETHER][4];
        for (int m = 0; m < TOGETHER; ++m)
            for (int j = 0; j < 4; ++j) sum[m][j] = start[m];
        for (int i = 0; i < I / 4; ++i) {
            const uint8_t* from = w.packed_of[k] + (i * O + o) * 4;
            __m512i row[4];
            for (int j = 0; j < 4; ++j) row[j] = _mm512_load_si512(from + 64 * j);
            for (int m = 0; m < TOGETHER; ++m) {
                int32_t four;
                std::memcpy(&four, x[m] + 4 * i, 4);
                const __m512i all = _mm512_set1_epi32(four);
                for (int j = 0; j < 4; ++j) sum[m][j] = _mm512_dpbusd_epi32(sum[m][j], row[j], all);
            }
        }
        for (int m = 0; m < TOGETHER; ++m)
            for (int j = 0; j < 4; ++j) _mm512_store_si512(y[m] + o + 16 * j, _mm512_slli_epi32(sum[m][j], 8));
    }
}
#else
inline int32_t dot(const int8_t* a, const int8_t* b, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

#ifdef PACKED
template <int O, int I>
inline void product(const Weights& w, int k, const int8_t (&x)[TOGETHER][I], int32_t (&y)[TOGETHER][O]) {
    alignas(32) int16_t wide[TOGETHER][I];
    for (int m = 0; m < TOGETHER; ++m)
        for (int i = 0; i < I; ++i) wide[m][i] = x[m][i];
    for (int o = 0; o < O; o += 16) {
        __m256i sum[TOGETHER][2] = {};
        for (int i = 0; i < I / 2; ++i) {
            const auto* from = reinterpret_cast<const __m256i*>(w.packed_of[k] + (i * O + o) * 2);
            const __m256i row[2] = {_mm256_load_si256(from), _mm256_load_si256(from + 1)};
            for (int m = 0; m < TOGETHER; ++m) {
                int32_t two;
                std::memcpy(&two, wide[m] + 2 * i, 4);
                const __m256i all = _mm256_set1_epi32(two);
                for (int j = 0; j < 2; ++j) sum[m][j] = _mm256_add_epi32(sum[m][j], _mm256_madd_epi16(row[j], all));
            }
        }
        for (int m = 0; m < TOGETHER; ++m)
            for (int j = 0; j < 2; ++j)
                _mm256_store_si256(reinterpret_cast<__m256i*>(y[m] + o + 8 * j), _mm256_slli_epi32(sum[m][j], 8));
    }
}
#else
template <int O, int I>
inline void product(const Weights& w, int k, const int8_t (&x)[TOGETHER][I], int32_t (&y)[TOGETHER][O]) {
    for (int m = 0; m < TOGETHER; ++m)
        for (int o = 0; o < O; ++o) y[m][o] = 256 * dot(w.of[k] + o * I, x[m], I);
}
#endif
#endif

template <int O>
inline void add_noise(int32_t* __restrict sum, const int8_t* __restrict A, int32_t h) {
    for (int o = 0; o < O; ++o) sum[o] += h * A[o];
}

template <int O>
inline void round_to_bytes(const int32_t* __restrict sum, int shift, int least, int8_t* __restrict y) {
    for (int o = 0; o < O; ++o) y[o] = std::min(127, std::max(least, (sum[o] + (1 << (shift - 1))) >> shift));
}

template <int O, int I>
inline void linear(const Weights& w, int k, const Noise (&noise)[TOGETHER][PARAMETERS], const int8_t (&x)[TOGETHER][I],
                   int8_t (&y)[TOGETHER][O], int least = -127) {
    constexpr int SHIFT = 8 + (I == D ? 7 : 8);  // 8 for the noise; 4 and half of log2(I) for the product
    alignas(64) int32_t sum[TOGETHER][O];
    product<O, I>(w, k, x, sum);
    for (int m = 0; m < TOGETHER; ++m) {
        const Noise& n = noise[m][k];
        if (n.sign) add_noise<O>(sum[m], n.A, n.sign * dot(n.B, x[m], I));
        round_to_bytes<O>(sum[m], SHIFT, least, y[m]);
    }
}

inline void norm(const int8_t* x, const int8_t* w, const Tables& tables, int8_t* y) {
    int32_t sum = 0;
    for (int i = 0; i < D; ++i) sum += x[i] < 0 ? -x[i] : x[i];
    const int32_t inverse = tables.inverse[sum / D];
    for (int i = 0; i < D; ++i) y[i] = clipped((x[i] * w[i] * inverse + (1 << 15)) >> 16);
}

inline int64_t loss_of(const int8_t* logits, int byte, const Tables& tables) {
    uint32_t sum = 0;
    for (int v = 0; v < V; ++v) sum += static_cast<uint32_t>(tables.exp2[logits[v] + 128]);
    const int whole = 31 - __builtin_clz(sum);
    return (whole - 7) * 256 + tables.log2[(sum << (31 - whole)) >> 23 & 255] - (logits[byte] + 128) * 16;
}

// Members first to first + TOGETHER - 1; one beyond the last is the last again
void advance(const Weights& w, const Tables& tables, int64_t first, int64_t members, int64_t length, const uint8_t* text,
             const int8_t* rows, int64_t width, const int64_t* starts, int8_t* state, int64_t* loss) {
    alignas(64) int8_t x[TOGETHER][D], h[TOGETHER][D], normed[TOGETHER][D], a[TOGETHER][D], b[TOGETHER][D];
    alignas(64) int8_t forget[TOGETHER][D], gated[TOGETHER][D], inner[TOGETHER][H], logits[TOGETHER][V];
    alignas(64) int8_t vectors[TOGETHER][PARAMETERS][D];
    Noise noise[TOGETHER][PARAMETERS];
    int64_t member[TOGETHER], total[TOGETHER] = {};
    for (int m = 0; m < TOGETHER; ++m) {
        member[m] = std::min(first + m, members - 1);
        std::memcpy(h[m], state + member[m] * D, D);
        const int8_t* row = rows ? rows + member[m] / 2 * width : nullptr;
        for (int k = 0; k < PARAMETERS; ++k)
            noise[m][k] = row ? Noise{row + starts[2 * k], row + starts[2 * k + 1], member[m] % 2 ? -1 : 1} : Noise{};
        for (int k : {NORM, FORGET_B, NEW_B, MLP_NORM, LAST_NORM}) {
            const Noise& n = noise[m][k];
            for (int i = 0; i < D; ++i) vectors[m][k][i] = clipped(w.of[k][i] + (n.sign ? n.sign * ((n.A[i] + 8) >> 4) : 0));
        }
    }
    for (int64_t t = 0; t < length; ++t) {
        for (int m = 0; m < TOGETHER; ++m) {
            const int byte = text[member[m] * (length + 1) + t];
            const Noise& n = noise[m][EMBED];
            const int32_t scale = n.sign ? n.sign * n.A[byte] : 0;
            for (int i = 0; i < D; ++i)
                x[m][i] = clipped(w.of[EMBED][byte * D + i] + (n.sign ? (scale * n.B[i] + 128) >> 8 : 0));
            norm(x[m], vectors[m][NORM], tables, normed[m]);
        }
        linear<D, D>(w, FORGET_X, noise, normed, a);
        linear<D, D>(w, FORGET_H, noise, h, b);
        for (int m = 0; m < TOGETHER; ++m)
            for (int i = 0; i < D; ++i) {
                forget[m][i] = clipped(a[m][i] + b[m][i] + vectors[m][FORGET_B][i]);
                gated[m][i] = static_cast<int8_t>(((forget[m][i] + 127) * h[m][i] + 128) >> 8);
            }
        linear<D, D>(w, NEW_X, noise, normed, a);
        linear<D, D>(w, NEW_H, noise, gated, b);
        for (int m = 0; m < TOGETHER; ++m) {
            for (int i = 0; i < D; ++i) {
                const int32_t proposed = clipped(a[m][i] + b[m][i] + vectors[m][NEW_B][i]);
                h[m][i] = static_cast<int8_t>(h[m][i] + (((forget[m][i] + 127) * (proposed - h[m][i]) + 128) >> 8));
                x[m][i] = clipped(x[m][i] + h[m][i]);
            }
            norm(x[m], vectors[m][MLP_NORM], tables, normed[m]);
        }
        linear<H, D>(w, UP, noise, normed, inner, 0);
        linear<D, H>(w, DOWN, noise, inner, a);
        for (int m = 0; m < TOGETHER; ++m) {
            for (int i = 0; i < D; ++i) x[m][i] = clipped(x[m][i] + a[m][i]);
            norm(x[m], vectors[m][LAST_NORM], tables, normed[m]);
        }
        linear<V, D>(w, HEAD, noise, normed, logits);
        for (int m = 0; m < TOGETHER; ++m)
            total[m] += loss_of(logits[m], text[member[m] * (length + 1) + t + 1], tables);
    }
    for (int m = 0; m < TOGETHER && first + m < members; ++m) {
        std::memcpy(state + member[m] * D, h[m], D);
        loss[member[m]] = total[m];
    }
}

}  // namespace

extern "C" void eggroll_integer_forward(const int8_t* const* weights, const int32_t* exp2, const int32_t* log2,
                                        const int32_t* inverse, int64_t members, int64_t length, const uint8_t* text,
                                        const int8_t* rows, int64_t width, const int64_t* starts, int8_t* state,
                                        int64_t* loss) {
    Weights w;
    std::memcpy(w.of, weights, sizeof w.of);
    pack(w);
#pragma omp parallel for schedule(dynamic, 4)
    for (int64_t first = 0; first < members; first += TOGETHER)
        advance(w, {exp2, log2, inverse}, first, members, length, text, rows, width, starts, state, loss);
}

// sum[o, i] += sum_k c[k] A[k, o] B[k, i]; without B, sum[o] += sum_k c[k] A[k, o]
extern "C" void eggroll_integer_sum(int64_t* sum, const int8_t* A, const int8_t* B, const int32_t* c, int64_t width,
                                    int64_t pairs, int64_t out, int64_t in) {
    constexpr int64_t SAFE = 4096, ROWS = 4, COLUMNS = 64;  // 4,096 terms of at most 32 * 106 * 106 fit into 32 bits
    const int64_t columns = B ? in : 1;
#pragma omp parallel for schedule(static)
    for (int64_t o = 0; o < out; o += ROWS)
        for (int64_t i = 0; i < columns; i += COLUMNS) {
            const int64_t wide = std::min(COLUMNS, columns - i), high = std::min(ROWS, out - o);
            for (int64_t begin = 0; begin < pairs; begin += SAFE) {
                int32_t part[ROWS][COLUMNS] = {};
                for (int64_t k = begin; k < std::min(begin + SAFE, pairs); ++k)
                    for (int64_t n = 0; n < high; ++n) {
                        const int32_t a = c[k] * A[k * width + o + n];
                        if (!B)
                            part[n][0] += a;
                        else if (wide == COLUMNS)
                            for (int64_t j = 0; j < COLUMNS; ++j) part[n][j] += a * B[k * width + i + j];
                        else
                            for (int64_t j = 0; j < wide; ++j) part[n][j] += a * B[k * width + i + j];
                    }
                for (int64_t n = 0; n < high; ++n)
                    for (int64_t j = 0; j < wide; ++j) sum[(o + n) * columns + i + j] += part[n][j];
            }
        }
}
