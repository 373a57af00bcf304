// Sums over a whole buffer, in f64 over fixed parts.

// partial[block] = sum of the squares of elements block * part .. (block + 1) * part; `part` is a multiple of 8.
template <typename T> __global__ void sum_of_squares(const T* x, double* partial, i64 len, i64 part) {
    const int N = Lanes<T>::N;
    const i64 begin = blockIdx.x * part, end = begin + part < len ? begin + part : len;
    double sum = 0;
    const i64 whole = aligned(x) ? begin + (end - begin) / N * N : begin;
    for (i64 i = begin + threadIdx.x * N; i < whole; i += blockDim.x * N) {
        float a[N];
        load(x + i, a);
#pragma unroll
        for (int j = 0; j < N; j++) sum += (double)a[j] * (double)a[j];
    }
    for (i64 i = whole + threadIdx.x; i < end; i += blockDim.x) sum += (double)get(x[i]) * (double)get(x[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// out[0] = sum of `len` numbers. One block.
__global__ void sum_doubles(const double* x, double* out, i64 len) {
    double sum = 0;
    for (i64 i = threadIdx.x; i < len; i += blockDim.x) sum += x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[0] = sum;
}
