// silu(gate) * up on rows that hold gate and up side by side. A block for each row.

template <int N, typename T>
__device__ __forceinline__ void swiglu_forward_row(const T* gate, const T* up, T* out, int width) {
    for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        float z[N], u[N];
        load(gate + i, z);
        load(up + i, u);
#pragma unroll
        for (int j = 0; j < N; j++) u[j] *= z[j] / (1.0f + expf(-z[j]));
        store(out + i, u);
    }
}

// gate_up: [rows, 2 * width] to out: [rows, width].
template <typename T> __global__ void swiglu_forward(const T* gate_up, T* out, i64 width) {
    const int N = Lanes<T>::N;
    const T* gate = gate_up + (i64)blockIdx.x * 2 * width;
    out += blockIdx.x * width;
    if (width % N == 0 && aligned(gate) && aligned(out)) swiglu_forward_row<N>(gate, gate + width, out, width);
    else swiglu_forward_row<1>(gate, gate + width, out, width);
}

template <int N, typename T>
__device__ __forceinline__ void swiglu_backward_row(const T* grad, const T* gate, const T* up, T* d_gate, T* d_up,
                                                    T* activation, int width) {
    for (int i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        float g[N], z[N], u[N], dz[N], du[N], out[N];
        load(grad + i, g);
        load(gate + i, z);
        load(up + i, u);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float sigmoid = 1.0f / (1.0f + expf(-z[j]));
            const float silu = z[j] * sigmoid;
            dz[j] = g[j] * u[j] * (sigmoid + silu - silu * sigmoid);
            du[j] = g[j] * silu;
            out[j] = silu * u[j];
        }
        store(d_gate + i, dz);
        store(d_up + i, du);
        store(activation + i, out);
    }
}

// grad: [rows, width], gate_up: [rows, 2 * width] to d_gate_up of the same shape and activation: [rows, width].
template <typename T>
__global__ void swiglu_backward(const T* grad, const T* gate_up, T* d_gate_up, T* activation, i64 width) {
    const int N = Lanes<T>::N;
    const T* gate = gate_up + (i64)blockIdx.x * 2 * width;
    T* d_gate = d_gate_up + (i64)blockIdx.x * 2 * width;
    grad += blockIdx.x * width, activation += blockIdx.x * width;
    if (width % N == 0 && aligned(grad) && aligned(gate) && aligned(d_gate) && aligned(activation))
        swiglu_backward_row<N>(grad, gate, gate + width, d_gate, d_gate + width, activation, width);
    else
        swiglu_backward_row<1>(grad, gate, gate + width, d_gate, d_gate + width, activation, width);
}
