// Sixteen lanes at a time, for whatever vector unit the compiler finds: AVX-512, two of AVX2, four of NEON.
//
// Numbers are stored as float32 or bfloat16 and computed with as float32. Lanes fix the order of every sum, so a row has
// the same bits however many rows are worked on together. A row's last lanes are padded with zeros, never dropped.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

inline Floats as_floats(Words w) {  // the same bits
    Floats v;
    std::memcpy(&v, &w, sizeof v);
    return v;
}

inline Words as_words(Floats v) {
    Words w;
    std::memcpy(&w, &v, sizeof w);
    return w;
}

inline Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Floats load(const uint16_t* from) {  // a bfloat16 is the upper half of a float32
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return as_floats(__builtin_convertvector(h, Words) << 16);
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline void store(uint16_t* to, Floats v) {  // round to nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
    const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
    const Words w = as_words(v);
    const Words rounded = (w + 0x7FFF + ((w >> 16) & 1)) >> 16;
    const Words nan = (w >> 16) | 0x40;
    const Halves h = __builtin_convertvector((w << 1) > 0xFF000000u ? nan : rounded, Halves);
#endif
    std::memcpy(to, &h, sizeof h);
}

template <typename T>
inline Floats load(const T* from, int64_t n) {  // the first n lanes, zeros behind
    if (n >= LANES) return load(from);
    T padded[LANES] = {};
    std::memcpy(padded, from, n * sizeof(T));
    return load(padded);
}

template <typename T>
inline void store(T* to, Floats v, int64_t n) {  // the first n lanes
    if (n >= LANES) return store(to, v);
    T lanes[LANES];
    store(lanes, v);
    std::memcpy(to, lanes, n * sizeof(T));
}

template <typename T>
inline Floats rounded(Floats v) {  // as it would be after being stored
    T lanes[LANES];
    store(lanes, v);
    return load(lanes);
}

inline float sum(Floats v) {
    float total[LANES];
    store(total, v);
    for (int64_t width = LANES / 2; width > 0; width /= 2)
        for (int64_t j = 0; j < width; ++j) total[j] += total[j + width];
    return total[0];
}
