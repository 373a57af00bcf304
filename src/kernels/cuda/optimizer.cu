// AdamW and SGD as one pass over memory, with moments as f32, bf16 or blocks of 256 8-bit codes. A warp for each block of
// 256 elements: a lane has elements 4 * lane .. + 4 of its first and of its second half.

const int F32 = 0, BF16 = 1, BLOCK8 = 2; // storage of a moment

const int BLOCK = 256, HALVES = 2;

// `codes` and the `cuts` halfway between them, in shared memory.
struct Book {
    const float *codes, *cuts;

    // Number of the nearest code: of the cuts below x.
    __device__ __forceinline__ u32 nearest(float x) const {
        u32 code = 0;
#pragma unroll
        for (u32 step = 128; step > 0; step /= 2)
            if (x > cuts[code + step - 1]) code += step;
        return code;
    }
};

// Four elements from `at` on; those at `len` and behind it are 0 and not touched.
template <typename T> __device__ __forceinline__ void load4(const T* x, i64 at, i64 len, float (&out)[4]) {
    if (at + 4 <= len && aligned(x)) {
        load(x + at, out);
    } else {
        for (int j = 0; j < 4; j++) out[j] = at + j < len ? get(x[at + j]) : 0.0f;
    }
}

template <typename T> __device__ __forceinline__ void store4(T* x, i64 at, i64 len, const float (&values)[4]) {
    if (at + 4 <= len && aligned(x)) {
        store(x + at, values);
    } else {
        for (int j = 0; j < 4; j++)
            if (at + j < len) put(x + at + j, values[j]);
    }
}

struct Moment {
    void* values;
    float* scales;
    i64 storage;
    Book book;
    bool is_signed;

    __device__ __forceinline__ void read(i64 block, i64 lane, i64 len, float (&out)[HALVES][4]) const {
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const i64 at = block * BLOCK + half * 128 + lane * 4;
            if (storage == F32) {
                load4((const float*)values, at, len, out[half]);
            } else if (storage == BF16) {
                load4((const bf16*)values, at, len, out[half]);
            } else {
                const unsigned char* codes = (const unsigned char*)values;
                u32 word[1] = {0};
                if (at + 4 <= len && aligned(codes)) {
                    load_words(codes + at, word);
                } else {
                    for (int j = 0; j < 4; j++)
                        if (at + j < len) word[0] |= (u32)codes[at + j] << 8 * j;
                }
                const float scale = scales[block];
                for (int j = 0; j < 4; j++)
                    out[half][j] = at + j < len ? book.codes[word[0] >> 8 * j & 255u] * scale : 0.0f;
            }
        }
    }

    // All lanes of the warp call it.
    __device__ __forceinline__ void write(i64 block, i64 lane, i64 len, const float (&x)[HALVES][4]) const {
        float scale = 0, inverse = 0;
        if (storage == BLOCK8) {
            for (int half = 0; half < HALVES; half++)
                for (int j = 0; j < 4; j++) {
                    const float size = fabsf(x[half][j]);
                    scale = size > scale ? size : scale;
                }
#pragma unroll
            for (int step = 16; step > 0; step /= 2) {
                const float other = __shfl_xor_sync(0xffffffffu, scale, step);
                scale = other > scale ? other : scale;
            }
            scale = scale < 1.1754944e-38f ? 0.0f : scale; // its inverse would overflow
            inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            if (lane == 0) scales[block] = scale;
        }
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            const i64 at = block * BLOCK + half * 128 + lane * 4;
            if (storage == F32) {
                store4((float*)values, at, len, x[half]);
            } else if (storage == BF16) {
                store4((bf16*)values, at, len, x[half]);
            } else {
                unsigned char* codes = (unsigned char*)values;
                u32 word[1] = {0};
                for (int j = 0; j < 4; j++) {
                    u32 code = book.nearest(x[half][j] * inverse);
                    // a second moment that is there never becomes 0, which would blow its step up to moment / eps
                    if (!is_signed && code == 0 && x[half][j] > 0.0f && scale > 0.0f) code = 1;
                    word[0] |= code << 8 * j;
                }
                if (at + 4 <= len && aligned(codes)) {
                    store_words(codes + at, word);
                } else {
                    for (int j = 0; j < 4; j++)
                        if (at + j < len) codes[at + j] = (unsigned char)(word[0] >> 8 * j);
                }
            }
        }
    }
};

// BOOKS, written by the host in front of these sources: signed codes, their cuts, unsigned codes, their cuts, 256 each.
#define LOAD_BOOKS(wanted)                                                                                             \
    __shared__ float books[1024];                                                                                      \
    if (wanted)                                                                                                        \
        for (int i = threadIdx.x; i < 1024; i += blockDim.x) books[i] = BOOKS[i];                                      \
    __syncthreads();

// weights = weights * decay - step_size * m / (sqrt(v) * root + eps), with m += (g - m) * new1, v = v * old2 + g^2 * new2
// and g = grad * scale. `skip` other than 0: nothing changes.
template <typename W, typename G>
__global__ void adamw(W* weights, const G* grad, void* first, float* first_scales, i64 first_storage, void* second,
                      float* second_scales, i64 second_storage, const float* scale, const float* skip,
                      bf16* copy, i64 len, float decay, float new1, float old2, float new2,
                      float step_size, float root, float eps) {
    if (skip && *skip != 0.0f) return;
    LOAD_BOOKS(first_storage == BLOCK8 || second_storage == BLOCK8)
    const i64 lane = threadIdx.x % 32, block = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (block * BLOCK >= len) return;
    const float factor = scale ? *scale : 1.0f;
    const Moment ms = {first, first_scales, first_storage, {books, books + 256}, true};
    const Moment vs = {second, second_scales, second_storage, {books + 512, books + 768}, false};
    float m[HALVES][4], v[HALVES][4];
    ms.read(block, lane, len, m);
    vs.read(block, lane, len, v);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const i64 at = block * BLOCK + half * 128 + lane * 4;
        float w[4], g[4];
        load4(weights, at, len, w);
        load4(grad, at, len, g);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float gj = g[j] * factor;
            m[half][j] += (gj - m[half][j]) * new1;
            v[half][j] = v[half][j] * old2 + gj * gj * new2;
            w[j] = w[j] * decay - step_size * m[half][j] / (sqrtf(v[half][j]) * root + eps);
        }
        store4(weights, at, len, w);
        if (copy) store4(copy, at, len, w);
    }
    ms.write(block, lane, len, m);
    vs.write(block, lane, len, v);
}

// weights -= lr * m, with m = m * momentum + g and g = grad * scale + decay * weights. Without `first`, m = g.
template <typename W, typename G>
__global__ void sgd(W* weights, const G* grad, void* first, float* first_scales, i64 first_storage, const float* scale,
                    const float* skip, bf16* copy, i64 len, float lr, float momentum, float decay) {
    if (skip && *skip != 0.0f) return;
    LOAD_BOOKS(first_storage == BLOCK8)
    const i64 lane = threadIdx.x % 32, block = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (block * BLOCK >= len) return;
    const float factor = scale ? *scale : 1.0f;
    const Moment ms = {first, first_scales, first_storage, {books, books + 256}, true};
    float m[HALVES][4] = {};
    if (first) ms.read(block, lane, len, m);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const i64 at = block * BLOCK + half * 128 + lane * 4;
        float w[4], g[4];
        load4(weights, at, len, w);
        load4(grad, at, len, g);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            m[half][j] = m[half][j] * momentum + (g[j] * factor + decay * w[j]);
            w[j] -= lr * m[half][j];
        }
        store4(weights, at, len, w);
        if (copy) store4(copy, at, len, w);
    }
    if (first) ms.write(block, lane, len, m);
}
