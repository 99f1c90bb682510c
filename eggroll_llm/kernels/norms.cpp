// Two operations of a transformer block in one pass each; vLLM composes them of up to nine torch operations on a CPU.
//
//     rms_norm        s = x (+ residual),    y = round(s / sqrt(mean(s^2) + epsilon)) * weight
//     silu_and_mul    y = round(g / (1 + exp(-g))) * u,    x = [g | u]
//
// They round where vLLM's eager operations do. Only the order of the sum of squares and the last bit of exp differ.

#include <cmath>
#include <initializer_list>

#include "vector.h"

namespace {

template <typename T>
void rms_norm(T* y, const T* x, T* residual, const T* weight, float epsilon, int64_t outer, int64_t inner,
              int64_t outer_stride, int64_t inner_stride, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < outer * inner; ++row) {
        const T* xr = x + row / inner * outer_stride + row % inner * inner_stride;
        T* rr = residual + row * size;
        T* yr = y + row * size;
        Floats squares = {};
        for (int64_t i = 0; i < size; i += LANES) {
            Floats s = load(xr + i, size - i);
            if (residual) s += load(rr + i, size - i);
            squares += s * s;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / size + epsilon);
        for (int64_t i = 0; i < size; i += LANES) {
            Floats s = load(xr + i, size - i);
            if (residual) {
                s += load(rr + i, size - i);
                store(rr + i, s, size - i);
            }
            store(yr + i, rounded<T>(s * scale) * load(weight + i, size - i), size - i);
        }
    }
}

// exp(x), relative error 2e-7: 2^k e^f with |f| <= ln(2) / 2 and e^f as a Taylor polynomial. Beyond 88 it is infinite,
// below -87 it stays at 1e-38.
inline Floats exponential(Floats x) {
    const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f, infinite = Floats{} + INFINITY;
    const auto overflows = x > high;
    x = x < low ? low : overflows ? high : x;
    const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    const Floats shifted = x * 1.44269504f + magic;
    const Floats k = shifted - magic;
    const Floats f = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    Floats p = Floats{} + 1.0f / 5040;
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) p = p * f + c;
    const Words exponent = as_words(shifted) << 23;  // the upper bits of the magic number are shifted out
    return overflows ? infinite : as_floats(as_words(p) + exponent);
}

template <typename T>
void silu_and_mul(T* y, const T* x, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* gate = x + row * 2 * size;
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats g = load(gate + i, size - i);
            const Floats silu = rounded<T>(g / (1.0f + exponential(-g)));
            store(y + row * size + i, silu * load(gate + size + i, size - i), size - i);
        }
    }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                           \
    extern "C" void eggroll_rms_norm_##suffix(T* y, const T* x, T* residual, const T* weight, float epsilon,        \
                                              int64_t outer, int64_t inner, int64_t outer_stride,                   \
                                              int64_t inner_stride, int64_t size) {                                 \
        rms_norm(y, x, residual, weight, epsilon, outer, inner, outer_stride, inner_stride, size);                  \
    }                                                                                                               \
    extern "C" void eggroll_silu_and_mul_##suffix(T* y, const T* x, int64_t rows, int64_t size) {                   \
        silu_and_mul(y, x, rows, size);                                                                             \
    }

EXPORT(float32, float)
EXPORT(bfloat16, uint16_t)
