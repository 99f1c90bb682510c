// y[t, o] += sum_r A[s, c, r, o] * sum_i B[s, c, r, i] * x[t, i],    s = slot[t],  c = the slice that o lies in
//
// The perturbation of a member, added to the output of a linear layer: one call per layer, one pass over the tokens,
// factors read where they are, float32 sums, one rounding. A token with slot -1 belongs to the base model and is left
// as it is. Neighbours of one member share what is loaded, up to four at a time; a row depends on nothing but its own
// token, so results are the same in any batch. A carries sign * sigma / sqrt(r).

#include <algorithm>
#include <vector>

#include "vector.h"

namespace {

constexpr int64_t MAX_RANK = 64;

struct Shape {
    int64_t in, out, rank, slices;
    const int64_t* slice_ends;
    int64_t slot_A, slot_B;  // from one slot to the next
};

// h[n][r] = sum_i B[r, i] * x[n, i] for N tokens of one member, x in float32 and padded to whole vectors
template <int N, typename T>
void project(float (&h)[N][MAX_RANK], const float* x, int64_t padded, const T* B, const Shape& shape) {
    for (int64_t r = 0; r < shape.rank; ++r) {
        const T* Br = B + r * shape.in;
        Floats even[N] = {}, odd[N] = {};  // two sums, so that one need not wait for the other
        int64_t i = 0;
        for (; i + 2 * LANES <= shape.in; i += 2 * LANES) {
            const Floats b0 = load(Br + i), b1 = load(Br + i + LANES);
            for (int n = 0; n < N; ++n) {
                even[n] += b0 * load(x + n * padded + i);
                odd[n] += b1 * load(x + n * padded + i + LANES);
            }
        }
        for (; i < shape.in; i += LANES) {
            const Floats b = load(Br + i, shape.in - i);
            for (int n = 0; n < N; ++n) even[n] += b * load(x + n * padded + i);
        }
        for (int n = 0; n < N; ++n) h[n][r] = sum(even[n] + odd[n]);
    }
}

// y[n, o] += sum_r A[r, o] * h[n][r] for the `size` outputs of one slice
template <int N, typename T>
void expand(T* y, const float (&h)[N][MAX_RANK], const T* A, int64_t size, const Shape& shape) {
    for (int64_t o = 0; o < size; o += LANES) {
        Floats total[N];
        for (int n = 0; n < N; ++n) total[n] = load(y + n * shape.out + o, size - o);
        for (int64_t r = 0; r < shape.rank; ++r) {
            const Floats a = load(A + r * size + o, size - o);
            for (int n = 0; n < N; ++n) total[n] += a * h[n][r];
        }
        for (int n = 0; n < N; ++n) store(y + n * shape.out + o, total[n], size - o);
    }
}

template <int N, typename T>
void add_term_to(T* y, const T* x, const T* A, const T* B, const Shape& shape, std::vector<float>& widened) {
    const int64_t padded = (shape.in + LANES - 1) / LANES * LANES;
    for (int n = 0; n < N; ++n)
        for (int64_t i = 0; i < shape.in; i += LANES)
            store(widened.data() + n * padded + i, load(x + n * shape.in + i, shape.in - i));
    for (int64_t c = 0, begin = 0; c < shape.slices; begin = shape.slice_ends[c++]) {
        float h[N][MAX_RANK];
        project<N>(h, widened.data(), padded, B + c * shape.rank * shape.in, shape);
        expand<N>(y + begin, h, A + shape.rank * begin, shape.slice_ends[c] - begin, shape);
    }
}

// Whether every token's slot exists; if not, nothing is added.
template <typename T>
bool add_term(T* y, const T* x, const T* A, const T* B, const int32_t* slot, int64_t tokens, int64_t slots,
              const Shape& shape) {
    if (std::any_of(slot, slot + tokens, [slots](int32_t s) { return s >= slots; })) return false;
    constexpr int64_t SHARE = 16;  // tokens of one piece of work
#pragma omp parallel
    {
        std::vector<float> widened(4 * (shape.in + LANES));
#pragma omp for schedule(static)
        for (int64_t first = 0; first < tokens; first += SHARE) {
            const int64_t end = first + SHARE < tokens ? first + SHARE : tokens;
            for (int64_t t = first, n; t < end; t += n) {
                n = 1;
                if (slot[t] < 0) continue;
                while (n < 4 && t + n < end && slot[t + n] == slot[t]) ++n;
                n = n == 3 ? 2 : n;
                const auto add = n == 4 ? add_term_to<4, T> : n == 2 ? add_term_to<2, T> : add_term_to<1, T>;
                add(y + t * shape.out, x + t * shape.in, A + slot[t] * shape.slot_A, B + slot[t] * shape.slot_B, shape,
                    widened);
            }
        }
    }
    return true;
}

}  // namespace

#define EXPORT(suffix, T)                                                                                           \
    extern "C" bool eggroll_add_term_##suffix(T* y, const T* x, const T* A, const T* B, const int32_t* slot,        \
                                              const int64_t* slice_ends, int64_t tokens, int64_t in, int64_t out,   \
                                              int64_t rank, int64_t slices, int64_t slots, int64_t slot_A,          \
                                              int64_t slot_B) {                                                     \
        const Shape shape{in, out, rank, slices, slice_ends, slot_A, slot_B};                                       \
        return add_term(y, x, A, B, slot, tokens, slots, shape);                                                    \
    }

EXPORT(float32, float)
EXPORT(bfloat16, uint16_t)
