// The head's passes over rows of logits. A block for each row.

// Maximum so far, its first index, and the sum of exp(x - maximum): the online form (arXiv 1805.02867).
struct Online {
    float maximum, sum;
    int index;

    // A NaN never is the maximum but makes the sum NaN; exp(-inf - -inf) does not occur.
    __device__ __forceinline__ void add(const Online& other) {
        const float m = other.maximum > maximum ? other.maximum : maximum;
        const float shift = m == -infinity() ? 0.0f : m;
        sum = sum * expf(maximum - shift) + other.sum * expf(other.maximum - shift);
        if (other.maximum > maximum || (other.maximum == maximum && other.index < index)) index = other.index;
        maximum = m;
    }
};

template <int N, typename T> __device__ __forceinline__ Online online_row(const T* logits, int width) {
    Online all = {-infinity(), 0.0f, 0x7fffffff};
    for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        float x[N];
        load(logits + i, x);
        Online part = {x[0], 0.0f, i};
#pragma unroll
        for (int j = 1; j < N; j++)
            if (x[j] > part.maximum || part.maximum != part.maximum) part.maximum = x[j], part.index = i + j;
        if (part.maximum != part.maximum) part.maximum = -infinity(); // nothing but NaN
        const float m = part.maximum > all.maximum ? part.maximum : all.maximum;
        const float shift = m == -infinity() ? 0.0f : m;
        float sum = all.sum * expf(all.maximum - shift);
#pragma unroll
        for (int j = 0; j < N; j++) sum += expf(x[j] - shift);
        if (part.maximum > all.maximum || all.index == 0x7fffffff) all.index = part.index;
        all.maximum = m, all.sum = sum;
    }
    return all;
}

__device__ __forceinline__ Online warp_online(Online mine) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        Online other;
        other.maximum = __shfl_xor_sync(0xffffffffu, mine.maximum, lane);
        other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, lane);
        other.index = __shfl_xor_sync(0xffffffffu, mine.index, lane);
        mine.add(other);
    }
    return mine;
}

// out: [rows, 4]: maximum, sum of exp(x - maximum), the target's logit or 0, first index of the maximum. A row without any
// number above -inf has no distribution: its sum is NaN.
template <typename T> __global__ void softmax_statistics(const T* logits, const i64* target, float* out, i64 width) {
    const int N = Lanes<T>::N;
    __shared__ float maxima[32], sums[32];
    __shared__ int indices[32];
    const i64 row = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    logits += row * width;
    Online all = width % N == 0 && aligned(logits) ? online_row<N>(logits, width) : online_row<1>(logits, width);
    all = warp_online(all);
    if (lane == 0) maxima[warp] = all.maximum, sums[warp] = all.sum, indices[warp] = all.index;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < blockDim.x / 32; w++) all.add({maxima[w], sums[w], indices[w]});
        out[4 * row] = all.maximum;
        out[4 * row + 1] = all.maximum == -infinity() ? infinity() - infinity() : all.sum;
        const i64 at = target[row];
        out[4 * row + 2] = at < 0 ? 0.0f : at < width ? get(logits[at]) : infinity() - infinity();
        out[4 * row + 3] = (float)all.index;
    }
}

template <int N, typename T>
__device__ __forceinline__ void gradient_row(T* logits, float log_sum, float weight, i64 target, int width) {
    for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        float x[N];
        load(logits + i, x);
#pragma unroll
        for (int j = 0; j < N; j++) x[j] = weight * (expf(x[j] - log_sum) - (i + j == target ? 1.0f : 0.0f));
        store(logits + i, x);
    }
}

// logits = weight * (exp(logits - log_sum) - [column = target]).
template <typename T>
__global__ void softmax_gradient(T* logits, const float* log_sum, const float* weight, const i64* target, i64 width) {
    const int N = Lanes<T>::N;
    const i64 row = blockIdx.x;
    logits += row * width;
    if (width % N == 0 && aligned(logits)) gradient_row<N>(logits, log_sum[row], weight[row], target[row], width);
    else gradient_row<1>(logits, log_sum[row], weight[row], target[row], width);
}

template <int N, typename T>
__device__ __forceinline__ float cross_row(const T* logits, const T* reference, float log_sum, int width) {
    float sum = 0;
    for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        float a[N], b[N];
        load(logits + i, a);
        load(reference + i, b);
#pragma unroll
        for (int j = 0; j < N; j++) sum += expf(b[j] - log_sum) * (b[j] - a[j]);
    }
    return sum;
}

// out[row] = sum of exp(reference - ref_log_sum) * (reference - logits).
template <typename T>
__global__ void softmax_cross_difference(const T* logits, const T* reference, const float* ref_log_sum, float* out,
                                         i64 width) {
    const int N = Lanes<T>::N;
    const i64 row = blockIdx.x;
    logits += row * width, reference += row * width;
    float sum = width % N == 0 && aligned(logits) && aligned(reference)
                    ? cross_row<N>(logits, reference, ref_log_sum[row], width)
                    : cross_row<1>(logits, reference, ref_log_sum[row], width);
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[row] = sum;
}

template <int N, typename T>
__device__ __forceinline__ void divergence_row(T* logits, const T* reference, float log_sum, float ref_log_sum,
                                               float weight, int width) {
    for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        float a[N], b[N];
        load(logits + i, a);
        load(reference + i, b);
#pragma unroll
        for (int j = 0; j < N; j++) a[j] = weight * (expf(a[j] - log_sum) - expf(b[j] - ref_log_sum));
        store(logits + i, a);
    }
}

// logits = weight * (exp(logits - log_sum) - exp(reference - ref_log_sum)).
template <typename T>
__global__ void softmax_divergence_gradient(T* logits, const float* log_sum, const T* reference,
                                            const float* ref_log_sum, const float* weight, i64 width) {
    const int N = Lanes<T>::N;
    const i64 row = blockIdx.x;
    logits += row * width, reference += row * width;
    if (width % N == 0 && aligned(logits) && aligned(reference))
        divergence_row<N>(logits, reference, log_sum[row], ref_log_sum[row], weight[row], width);
    else
        divergence_row<1>(logits, reference, log_sum[row], ref_log_sum[row], weight[row], width);
}
